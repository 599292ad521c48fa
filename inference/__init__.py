"""How posteriors are computed: the log joint of any Pyro model and guide, the fit of a VAE, and reference posteriors."""
