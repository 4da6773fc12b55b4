"""Rollouts by vLLM servers: processes of their own, on this machine or on others."""
