"""The numbers of INT8: linear layers, their ranges and scales, transforms that fold, Q/DQ pairs."""
