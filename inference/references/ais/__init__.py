"""Bounds on log p(x) by annealed importance sampling."""
