"""Posteriors by many Hamiltonian chains at once, and what certifies them."""
