"""A checkpoint to actions; a robot loads it without rosbags. May import the ground, act_model, dataset.normalize, recordings.images."""
