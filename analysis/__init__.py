"""What can be trusted: audits, verdicts, answers, figures and reports."""
