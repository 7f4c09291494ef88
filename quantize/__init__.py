"""How INT8 gets its numbers: linear layers, their ranges and scales, transforms that fold, Q/DQ pairs."""
