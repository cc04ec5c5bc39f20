"""Bags to episodes: storage files, topics, signals, pictures. No torch here; imports faults, files and config."""
