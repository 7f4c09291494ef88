"""The driver that runs the stages, and the command line."""
