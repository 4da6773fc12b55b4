"""Reads prompts from files and the hub: schemas, templates, splits and subsets."""

from datamodules.prompts.benchmarks import Benchmark
from datamodules.prompts.file import PromptFile, PromptSource

__all__ = ["Benchmark", "PromptFile", "PromptSource"]
