"""Text in, router activations and per-expert sums out."""
