"""A Pyro pair: which sites it has, how values are given to it, how its weights are held."""
