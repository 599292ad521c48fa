"""The components that a spec can name, and their options."""
