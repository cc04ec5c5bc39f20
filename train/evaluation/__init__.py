"""Is a policy good? Errors on recordings, closed loop, page. Imports dataset, policy and page."""
