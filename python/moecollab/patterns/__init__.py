"""Groups of experts that work together, and what they are about."""
