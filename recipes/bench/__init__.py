"""Recipes for `infopt bench`."""
