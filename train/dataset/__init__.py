"""Episodes to batches: cache, batches of action chunks, normalization, augmentation. May import the ground and recordings."""
