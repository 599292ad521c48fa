"""From numbers to a verdict: rules, thresholds and remedies."""
