"""The questions that a fitted run answers."""
