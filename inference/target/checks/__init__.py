"""Tests of a new log joint, and of parts of its data, by running the programs."""
