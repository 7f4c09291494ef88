"""Faults, and where they lie: layers that err, machines that can't, inputs for Polygraphy."""
