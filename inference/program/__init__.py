"""Pyro programs as pairs of model and guide: their sites, how values are substituted, and how weights are frozen."""
