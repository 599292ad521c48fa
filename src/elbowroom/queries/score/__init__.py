"""Scores of new rows: log p(x), and conformal p-values against rows of the fit."""
