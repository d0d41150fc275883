"""Input factors of convolutions without unfolding."""
