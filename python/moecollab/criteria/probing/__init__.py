"""Running a model on a probe with experts masked, or with gradients; needs torch."""
