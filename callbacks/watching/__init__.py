"""Callbacks that only look: metrics, pictures, completions, progress."""
