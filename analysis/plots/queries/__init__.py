"""The figures of answers."""
