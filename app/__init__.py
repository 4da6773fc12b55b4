"""Dots: data-efficient reinforcement fine-tuning of language models, as a Lightning application."""

__version__ = "0.1.0"
