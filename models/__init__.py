"""Models p(x|z) p(z) and guides q(z|x), as plain modules."""
