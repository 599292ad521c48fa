"""Fitting a VAE by stochastic variational inference."""
