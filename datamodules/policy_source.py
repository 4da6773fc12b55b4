"""What the data need to know of the policy."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from datamodules.prompts.templates import Tools
from datamodules.validation import ValidationSet


@runtime_checkable
class PolicySource(Protocol):
    """A LightningModule that has a policy, whose tokenizer and initial weights are the defaults of the data."""

    @property
    def policy_path(self) -> str:
        """Folder or hub name of the initial weights."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    @property
    def tools(self) -> Tools | None:
        """The tools of its environments, by name, which prompts show to the policy; None without an environment."""

    def prompt_limit(self, measured: ValidationSet | None, where: str) -> int | None:
        """Return the most tokens of a prompt that leave room for a completion, or None.

        Args:
            measured: the set of the prompt; None for a training prompt.
            where: the option that names the prompts, for messages.
        """
