"""Data sets: built in, published, or the user's own files and frames."""

from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Source

__all__ = ["DEFAULT_SPLIT", "Dataset", "Fractions", "Source"]
