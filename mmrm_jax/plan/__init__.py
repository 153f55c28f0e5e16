"""What a training step would need on hardware that is not at hand: `mmrm plan`."""
