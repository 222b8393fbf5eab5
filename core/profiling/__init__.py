"""What a model needs and what this device delivers."""
