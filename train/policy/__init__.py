"""A checkpoint to actions. A robot loads it without rosbags; imports act_model, dataset.normalize, recordings.images."""
