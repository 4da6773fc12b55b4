"""Reads prompts from files and the hub: schemas, templates, splits and subsets."""

from datamodules.prompts.file import PromptFile, PromptSource

__all__ = ["PromptFile", "PromptSource"]
