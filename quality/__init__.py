"""Measures of how good the images are, and the search for the fastest bundle that is good enough."""
