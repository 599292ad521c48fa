"""What is believed: priors, likelihoods, networks, guides, the VAE that joins them, and the closed-form oracle."""
