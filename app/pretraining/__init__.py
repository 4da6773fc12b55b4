"""Supervised pretraining of small policies for the examples and tests."""

from app.pretraining.module import DemonstrationPretraining

__all__ = ["DemonstrationPretraining"]
