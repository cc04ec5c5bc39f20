"""Is a recording good? Topics, verdicts, a proposed configuration, a page. May import the ground, page and recordings; no torch."""
