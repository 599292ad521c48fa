"""Is this row like those of the fit? log p(x) and conformal p-values."""
