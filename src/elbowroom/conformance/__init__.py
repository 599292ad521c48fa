"""Checks that components of each kind follow the rules of their kind."""
