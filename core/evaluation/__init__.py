"""Is it still good: perplexity and divergence from a baseline."""
