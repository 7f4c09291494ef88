"""Scales, graph passes, Q/DQ, and the backends that run segments."""
