"""Prompt sources: classes named by `class_path` in the YAML and read once, at the start of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.files import open_table
from datamodules.prompts.reading import read_pool
from datamodules.prompts.schemas import SchemaOverrides, detect
from datamodules.prompts.tables import ranges
from datamodules.prompts.templates import Renderer, check_template

_PROBE = 64
"""Number of rows that the schema is detected from."""


class PromptSource(ABC):
    """Loads a pool of prompts.

    Attributes:
        system_prompt: goes before every prompt that has no system message.
        template: plain template; empty for the tokenizer's chat template.
        chat_template_kwargs: arguments of the chat template.
        max_prompt_length: longest prompt in tokens; None for no limit.
        context_limit: longest prompt in tokens that the policy's context leaves room for; None for no limit. The data
            module sets it.
    """

    system_prompt: str = ""
    template: str = ""
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    context_limit: int | None = None

    def __init__(
        self,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
    ) -> None:
        self._check_positive(max_prompt_length=max_prompt_length)
        if template:
            check_template(template)
        self.system_prompt, self.template = system_prompt, template
        self.chat_template_kwargs, self.max_prompt_length = chat_template_kwargs, max_prompt_length

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        """Load the pool, rendered for this tokenizer. `pool.report` counts what was dropped.

        Raises:
            UserError: the data cannot be used.
        """

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Return the renderer that applies this source's template."""
        return Renderer(tokenizer, self.template or None, self.system_prompt or None, self.chat_template_kwargs)

    def _check_positive(self, **options: int | None) -> None:
        for name, given in options.items():
            if given is not None and given < 1:
                raise UserError(f"{type(self).__name__} {name} is {given}. Set at least 1, or null for no limit.")


class PromptFile(PromptSource):
    """Prompts from a file, a saved data set, a folder or a hub data set, in any common schema.

    The schema is detected from the columns: TRL (`prompt`, `solution`), verl and SkyRL (`prompt`,
    `reward_model.ground_truth` or `reward_spec.ground_truth`), OpenRLHF (`input`, `label`), open-instruct (`messages`,
    `ground_truth`), NeMo-RL (`input`, `output`), GSM8K (`question`, `answer` with `####`), MATH (`problem`, `answer`
    or `solution`), Alpaca (`instruction` and `input`, `output`), Dolly (`instruction` and `context`, `response`),
    ShareGPT (`conversations`). A `context` goes before its `question`. All other columns are passed to the rewards.

    Args:
        path: a .jsonl, .json, .parquet or .csv file, a folder, or a hub name such as `openai/gsm8k`. It is never a
            pattern.
        split: split of a hub data set or folder; slices such as `train[:10%]` are allowed.
        name: configuration of a hub data set, e.g. `main`.
        prompt_column: column with the text or messages, which then are the whole prompt; a dot leads into an object
            (`extra_info.question`).
        answer_column: column with the reference answer, e.g. `reward_model.ground_truth`; "auto" looks for one. Rows
            without an answer are dropped; null says that rows need none (the reward uses other columns).
        answer_format: where the answer is: after `####` (gsm8k), in the last `\\boxed{}` (boxed), or the whole value
            (verbatim).
        id_column: column that names the rows; by default `extra_info.index`, a unique `id`, or a hash of the prompt.
        system_prompt: goes before every prompt that has no system message.
        template: plain template such as `Question: {question}\\nAnswer:`; by default the tokenizer's chat template,
            or the plain text if it has none.
        chat_template_kwargs: arguments of the chat template, e.g. `{enable_thinking: false}`.
        max_prompt_length: prompts of more tokens are dropped and counted.
        limit: number of rows to read, from the start.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        prompt_column: str | None = None,
        answer_column: str | None = "auto",
        answer_format: Literal["auto", "verbatim", "gsm8k", "boxed"] = "auto",
        id_column: str | None = None,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(system_prompt, template, chat_template_kwargs, max_prompt_length)
        self._check_positive(limit=limit)
        self.path, self.name, self.split, self.limit = path, name, split, limit
        self.overrides = SchemaOverrides(prompt_column, answer_column, answer_format, id_column)

    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        named = [self.overrides.prompt_column, self.overrides.named_answer, self.overrides.id_column]
        table = open_table(self.path, self.name, self.split, [column for column in named if column is not None])
        if self.limit is not None:
            table = ranges([(table, 0, min(self.limit, len(table)))])
        probe = table.rows(range(min(_PROBE, len(table))))
        schema = detect(table.columns, probe, self.overrides, self.path)
        return read_pool(table, schema, self.renderer(tokenizer), self.path, self.max_prompt_length, self.context_limit)
