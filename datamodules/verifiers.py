"""Prompt pools from tasksets of `verifiers` (https://github.com/PrimeIntellect-ai/verifiers)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError, require
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptSource
from datamodules.prompts.reading import read_pool
from datamodules.prompts.schemas import Schema
from datamodules.prompts.tables import ListTable

_SCHEMA = Schema(prompt="prompt", answer=None, id="id", may_be_blank=True)
_GENERATOR = Path(__file__).with_name("verifiers_generator.py")


class VerifiersTasks(PromptSource):
    """Prompts of a taskset of `verifiers`, for training in its environment (`app.environments.Verifiers`).

    The column `task` holds the whole task as JSON, from which the environment makes it again, and `begins` the prompt,
    which its first request has to begin with.

    Args:
        taskset: name of the package or module that exports the taskset, e.g. `gsm8k_v1`.
        arguments: the taskset's configuration.
        limit: number of tasks to read, from the start; null for all of them.
        speaks_first: whether the environment keeps the tasks' prompts to itself and speaks first, as `user-sim` does.
            Not needed for tasks without a prompt.
        system_prompt: goes before every prompt that has no system message.
        template: plain template, e.g. `{question}\\n`; by default the tokenizer's chat template.
        chat_template_kwargs: arguments of the chat template.
        max_prompt_length: prompts of more tokens are dropped and counted.
        weight: weight of this source among several (see `data.mixture`); null for its number of prompts.
        rewards: names of those of model.rewards that score these prompts; null for all of them.
    """

    def __init__(
        self,
        taskset: str,
        arguments: dict[str, Any] | None = None,
        limit: int | None = None,
        speaks_first: bool = False,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        weight: float | None = None,
        rewards: list[str] | None = None,
    ) -> None:
        super().__init__(system_prompt, template, chat_template_kwargs, max_prompt_length, weight, rewards)
        self._check_positive(limit=limit)
        require("verifiers")
        self.taskset, self.arguments, self.limit = taskset, arguments or {}, limit
        self.speaks_first = speaks_first

    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        rows = read_tasks(self.taskset, self.arguments, self.limit, self.speaks_first)
        return read_pool(
            ListTable(rows),
            _SCHEMA,
            self.renderer(tokenizer),
            f"verifiers {self.taskset}",
            self.max_prompt_length,
            self.context_limit,
        )


def read_tasks(
    taskset: str, arguments: dict[str, Any], limit: int | None, speaks_first: bool = False
) -> list[dict[str, Any]]:
    """Return a row per task, with `id`, `prompt`, `task` and `begins`, which a child process reads.

    Raises:
        UserError: there is no such taskset, or it cannot be loaded with these arguments.
    """
    request = {"taskset": taskset, "arguments": arguments, "limit": limit, "speaks_first": speaks_first}
    child = subprocess.run(
        [sys.executable, "-P", str(_GENERATOR)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"Reading the tasks of {taskset} failed:\n{child.stderr}")
    reply = json.loads(child.stdout)
    if "error" in reply:
        raise UserError(
            f"The verifiers taskset {taskset!r} cannot be read: {reply['error']}. Correct its configuration."
        )
    return reply["rows"]
