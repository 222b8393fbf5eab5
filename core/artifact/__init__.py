"""A model on disk: located, read, written; and the embedded default model."""
