"""The backends, which open, build, store and run segments."""
