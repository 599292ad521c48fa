"""The role of each latent: information, decoding, effects."""
