"""How fast training and generation are, compared with plain baselines."""
