"""Samplers, executor, compensation and generation: NumPy and one backend, never torch."""
