"""Looking inside: which experts carry massive activations, attention sinks, knowledge."""
