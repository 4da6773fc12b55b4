"""The rollout half of a step: generate, score, and share between processes."""
