"""Recipes for `infopt distill`."""
