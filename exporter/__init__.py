"""From a torch DiT to ONNX segments: readers of checkpoints, cutting, tracing, parity."""
