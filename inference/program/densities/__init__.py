"""Log densities of sites: of all data at the same points by one product, and torch's own by equal formulas."""
