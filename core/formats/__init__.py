"""How a value is stored: number formats and packing; pure functions on tensors."""
