"""Draws, interpolations and reconstructions."""
