"""From numbers to a verdict: rules, their thresholds, and what to do."""
