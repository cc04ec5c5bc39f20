"""Is a recording good? Measures, verdict, proposal, page. No torch here; imports recordings and page."""
