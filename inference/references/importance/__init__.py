"""Posteriors by importance sampling, and the k-hat that certifies it."""
