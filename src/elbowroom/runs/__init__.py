"""What is done to a run: fit, audit, advice, comparison, improvement."""
