"""Queries of a fitted run, such as encode, score, impute and sample."""
