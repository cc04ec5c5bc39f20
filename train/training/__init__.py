"""What a run needs and leaves: checkpoints, its folder, its processes, its log. Imports dataset and policy."""
