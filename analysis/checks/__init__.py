"""Checks of a model by its simulations: calibration, ranks, criticism."""
