"""Posteriors without the guide's approximation; each says for every datum whether it can be trusted."""
