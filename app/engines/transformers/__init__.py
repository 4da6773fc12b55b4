"""Rollouts with the policy itself, in the trainer's process."""
