"""Metrics, curves and pictures of a run, and the estimate of its memory."""
