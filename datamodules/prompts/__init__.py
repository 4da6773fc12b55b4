"""Reads prompts from files and hubs: schemas, templates, splits, subsets."""

from datamodules.prompts.file import PromptFile, PromptSource

__all__ = ["PromptFile", "PromptSource"]
