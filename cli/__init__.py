"""The commands, and the lines that they print."""
