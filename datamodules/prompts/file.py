"""Where prompts come from. A source is named by `class_path` in the YAML and read once, when a run begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.files import open_dataset
from datamodules.prompts.reading import read_pool
from datamodules.prompts.schemas import SchemaOverrides, detect
from datamodules.prompts.splits import hold_out, split_pool
from datamodules.prompts.tables import DatasetTable
from datamodules.prompts.templates import Renderer, check_template
from datamodules.report import ReadReport

__all__ = ["PromptFile", "PromptSource", "ReadReport", "hold_out", "split_pool"]

_PROBE = 64
"""Rows looked at to tell one schema from another."""


class PromptSource(ABC):
    """Makes a pool of prompts."""

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        """The pool, as the policy with this tokenizer reads it; `pool.report` says what was dropped.

        Raises UserError when the data cannot be used.
        """


class PromptFile(PromptSource):
    """Prompts of a file, a saved data set, a folder, or a data set of the hub, in any usual schema.

    The schema is told from the columns: TRL (`prompt`, `solution`), verl and SkyRL (`prompt`,
    `reward_model.ground_truth` or `reward_spec.ground_truth`), OpenRLHF (`input`, `label`), open-instruct (`messages`,
    `ground_truth`), NeMo-RL (`input`, `output`), GSM8K (`question`, `answer` with `####`), MATH (`problem`, `answer`
    or `solution`). All other columns are handed to the rewards.

    Args:
        path: a .jsonl, .json, .parquet or .csv file, a folder, or a hub name such as `openai/gsm8k`.
        split: of a hub data set or folder; slices such as `train[:10%]` are understood.
        name: configuration of a hub data set, e.g. `main`.
        prompt_column: holds the text or the messages; a dot goes into an object (`extra_info.question`).
        answer_column: holds the reference answer, e.g. `reward_model.ground_truth`.
        answer_format: how the answer is written: after `####` (gsm8k), in the last `\\boxed{}` (boxed), or as it is.
        id_column: names the rows; by default `extra_info.index`, a unique `id`, or a hash of the prompt.
        system_prompt: put before every prompt that has no system message.
        template: plain template such as `Question: {question}\\nAnswer:`; by default the tokenizer's chat template,
            or the plain text where it has none.
        chat_template_kwargs: passed on to the chat template, e.g. `{enable_thinking: false}`.
        max_prompt_length: prompts of more tokens are dropped and counted.
        limit: only the first so many rows are read.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        answer_format: Literal["auto", "verbatim", "gsm8k", "boxed"] = "auto",
        id_column: str | None = None,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        for option, given in (("max_prompt_length", max_prompt_length), ("limit", limit)):
            if given is not None and given < 1:
                raise UserError(f"PromptFile {option}={given}: expected at least 1, or null for no limit")
        if template:
            check_template(template)
        self.path = path
        self.split = split
        self.name = name
        self.overrides = SchemaOverrides(prompt_column, answer_column, answer_format, id_column)
        self.system_prompt = system_prompt
        self.template = template
        self.chat_template_kwargs = chat_template_kwargs
        self.max_prompt_length = max_prompt_length
        self.limit = limit

    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        named = [self.overrides.prompt_column, self.overrides.answer_column, self.overrides.id_column]
        dataset = open_dataset(self.path, self.name, self.split, [column for column in named if column is not None])
        if self.limit is not None:
            dataset = dataset.select(range(min(self.limit, len(dataset))))
        table = DatasetTable(dataset)
        probe = table.rows(range(min(_PROBE, len(table))))
        schema = detect(dataset.column_names, probe, self.overrides, self.path)
        renderer = Renderer(tokenizer, self.template or None, self.system_prompt or None, self.chat_template_kwargs)
        return read_pool(table, schema, renderer, self.path, self.max_prompt_length)
