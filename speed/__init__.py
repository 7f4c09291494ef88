"""Speed and size of a bundle, beside its peers and its limits."""
