"""A Pyro program held as it is: its weights in a snapshot, its arithmetic in one precision."""
