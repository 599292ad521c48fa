"""Imputation of missing cells."""
