"""What a run leaves: checkpoints, log, run folder; and its processes. May import all rooms above; no rosbags reader of its own."""
