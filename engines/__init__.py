"""How a segment is opened, built, stored and run: the backends."""
