"""Recipes for `infopt quantize`."""
