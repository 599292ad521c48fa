"""Exact posteriors on a lattice, for one to three latents."""
