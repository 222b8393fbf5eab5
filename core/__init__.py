"""What infopt means: compression, runtime, measurement."""
