"""Where routers and experts live in a model, and how to watch, mask and cut them."""
