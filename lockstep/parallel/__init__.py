"""Training over several processes: how ranks share a model, and what they exchange."""
