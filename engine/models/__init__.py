"""Models: from a name to something that maps tokens to logits."""
