"""Which experts to keep, and cutting the others out."""
