"""From a configuration to trained weights: the setup, one optimizer step, the loop, checkpoints."""
