"""What each latent does: information, decoding, effects."""
