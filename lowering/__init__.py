"""Changes of a segment for one backend: fusions, the typed form, the sampler's update as a graph."""
