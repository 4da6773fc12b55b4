"""Callbacks that keep a run going: checkpoints, random state, signals, sharding."""
