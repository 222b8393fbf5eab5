"""Pruning: which weights, channels, heads and blocks a model can do without."""
