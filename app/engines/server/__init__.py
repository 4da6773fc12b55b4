"""Rollouts by vLLM servers, which are separate processes on this machine or on others."""
