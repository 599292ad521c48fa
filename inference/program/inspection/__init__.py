"""Inspection of a Pyro (model, guide) pair: its plate, its sites, and the forms that are refused."""
