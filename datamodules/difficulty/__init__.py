"""Forecasts of the current difficulty of every prompt in a pool."""
