"""Training: losses, the schedule, the loop, and a state that survives a kill."""
