"""Training the routers and norms of a pruned model to do what the whole model does."""
