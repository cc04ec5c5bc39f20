"""Episodes to batches: the cache on disk, batches of chunks, normalisation, augmentation. Imports recordings."""
