"""Model definitions in Flax NNX: vision tower, decoder, InternVL, reward model."""
