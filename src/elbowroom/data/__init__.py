"""Data sets: built in, published, or the user's own files and frames."""

from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Source
from elbowroom.data.file import File

__all__ = ["DEFAULT_SPLIT", "Dataset", "File", "Fractions", "Source"]
