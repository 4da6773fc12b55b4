"""Dots: what flows. Prompts, selectors, difficulty."""
