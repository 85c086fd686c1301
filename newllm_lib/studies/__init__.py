"""Instruments that study the model rather than train it: `bench` (speed, memory), `baselines` (to compare with)."""
