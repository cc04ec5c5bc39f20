"""Is a policy good? Errors on held-out recordings, a page, the demo arm in closed loop. May import all rooms above."""
