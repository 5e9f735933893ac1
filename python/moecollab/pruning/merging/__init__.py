"""Several experts made into one, and experts made into constants."""
