"""Recipes for `infopt prune`."""
