"""The layers of the runtime's decoder."""
