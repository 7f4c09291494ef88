"""How fast, how large, against whom and against which limit."""
