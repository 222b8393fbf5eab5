"""One decoder, many configs; and transformers models, loaded from an artifact."""
