"""Environments that the policy talks to in several turns, and their tools."""
