"""Posteriors by importance sampling, certified by k-hat."""
