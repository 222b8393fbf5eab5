"""Recipes: YAML in, frozen validated settings out; no torch."""
