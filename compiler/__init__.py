"""The driver, the stages that it runs in order, and what they keep."""
