"""Bags to episodes: storage files, topics, signals, pictures. May import the ground; no torch."""
