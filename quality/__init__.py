"""How good the images are, and what is the fastest that is good enough."""
