"""What an experiment with a plan costs: held-out loss and lm-eval tasks."""
