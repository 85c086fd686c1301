"""Learning-rate rules, batch sizes and initialisations on a grid of runs."""
