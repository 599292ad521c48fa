"""Analysis of a fitted model: audits, verdicts, answers, figures and reports."""
