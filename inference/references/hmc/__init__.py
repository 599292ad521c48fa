"""Posteriors by many Hamiltonian chains at once, and their certificates."""
