"""Recipes of several steps, for `infopt run`."""
