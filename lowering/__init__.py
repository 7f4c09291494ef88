"""What one backend wants changed in a segment: fusions, the typed form, the sampler's update as a graph."""
