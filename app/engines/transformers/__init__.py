"""Rollouts with the policy itself, in its own process."""
