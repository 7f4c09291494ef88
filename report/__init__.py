"""All of a bundle on one page."""
