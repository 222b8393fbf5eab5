"""Products with weights that stay packed in memory."""
