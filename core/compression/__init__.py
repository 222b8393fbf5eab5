"""What quantization, pruning and distillation share: calibration, the walk, statistics."""
