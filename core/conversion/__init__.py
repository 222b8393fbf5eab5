"""From one checkpoint format into another: the same weights, re-packed."""
