"""Shared parts of Markov chain methods: moves, normal and Student t approximations, diagnostics."""
