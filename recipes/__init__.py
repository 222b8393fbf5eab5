"""YAML recipes, as package data."""
