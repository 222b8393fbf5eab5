"""Every result, how it was made, how it is kept."""
