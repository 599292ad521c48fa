"""How it is computed: the log joint of any Pyro pair, fits, and reference posteriors."""
