"""What is believed: p(x|z) p(z) and the guide q(z|x), as plain modules."""
