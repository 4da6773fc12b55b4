"""Callbacks that make up the algorithm: rollouts, filters, replay, weight transfer."""
