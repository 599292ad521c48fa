"""What Markov chains share: moves, normal and Student t approximations, diagnostics."""
