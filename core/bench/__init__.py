"""Load against a server or an engine, and what the clients saw."""
