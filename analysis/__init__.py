"""What can be trusted: evidence, gaps, distances, the audit, figures, ArviZ files and the report."""
