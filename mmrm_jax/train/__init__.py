"""Training: state, optimiser, pure step, loop, checkpoints."""
