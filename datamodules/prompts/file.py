"""Prompt sources: classes named by `class_path` in the YAML and read once, at the start of a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.detection import PROBE, SchemaOverrides, detect
from datamodules.prompts.files import matching, open_table
from datamodules.prompts.readers import FileOptions
from datamodules.prompts.reading import read_pool
from datamodules.prompts.schemas import Schema
from datamodules.prompts.splits import sample_pool
from datamodules.prompts.tables import Table, files_of, ranges
from datamodules.prompts.templates import Renderer, Tools, check_template


class PromptSource(ABC):
    """Loads a pool of prompts.

    Attributes:
        system_prompt: goes before every prompt that has no system message.
        template: plain template; empty for the tokenizer's chat template.
        chat_template_kwargs: arguments of the chat template.
        max_prompt_length: longest prompt in tokens; None for no limit.
        weight: weight of the source among several; None for its number of prompts.
        rewards: names of the rewards that score its prompts; None for all.
        context_limit: longest prompt in tokens that the policy's context leaves room for; None for no limit. The data
            module sets it.
        tools: tools of the environments of the run, by name; None without an environment. The data module sets it.
    """

    system_prompt: str = ""
    template: str = ""
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    weight: float | None = None
    rewards: list[str] | None = None
    context_limit: int | None = None
    tools: Tools | None = None

    def __init__(
        self,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        weight: float | None = None,
        rewards: list[str] | None = None,
    ) -> None:
        self._check_positive(max_prompt_length=max_prompt_length)
        if weight is not None and not 0 <= weight < math.inf:
            raise UserError(f"{type(self).__name__} weight is {weight}, expected a number of at least 0. Change it.")
        if rewards == []:
            raise UserError(
                f"{type(self).__name__} rewards is an empty list, so that nothing would score its prompts. Name at "
                "least one of model.rewards, or set null for all of them."
            )
        if template:
            check_template(template)
        self.system_prompt, self.template = system_prompt, template
        self.chat_template_kwargs, self.max_prompt_length = chat_template_kwargs, max_prompt_length
        self.weight, self.rewards = weight, rewards

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        """Load the pool, rendered for this tokenizer. `pool.report` counts what was dropped.

        Raises:
            UserError: the data cannot be used.
        """

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Return the renderer that applies this source's template."""
        return Renderer(
            tokenizer, self.template or None, self.system_prompt or None, self.chat_template_kwargs, self.tools
        )

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
    ShareGPT (`conversations`), multiple choice (`question`, `choices` and `answer`, `label` or `answerKey`: the choices
    follow the question as lettered lines, and the answer is a letter). A `context` goes before its `question`. The last
    reply of a conversation is the answer where no column is. A `system` column is the row's system message, and `tools`
    go to the chat template. All other columns are passed to the rewards.

    Args:
        path: a .jsonl, .json, .parquet, .csv or .tsv file (texts also with .gz, .bz2 or .xz), a folder, or a hub name
            such as `openai/gsm8k`; or a list of them, which are read one after the other. It is a pattern only with
            `glob`.
        split: split of a hub data set or folder; slices such as `train[:10%]` are allowed.
        name: configuration of a hub data set, e.g. `main`.
        prompt_column: column with the text or messages, which then are the whole prompt; a dot leads into an object
            (`extra_info.question`).
        answer_column: column with the reference answer, e.g. `reward_model.ground_truth`; "auto" looks for one. Rows
            without an answer are dropped; null says that rows need none (the reward uses other columns).
        answer_format: where the answer is: after `####` (gsm8k), in the last `\\boxed{}` (boxed), the whole value
            (verbatim), or all entries of a list and all parts of a text between commas, in any order (set, as in
            OlympiadBench; with the other formats one entry of a list suffices).
        id_column: column that names the rows; by default `extra_info.index`, a unique `id`, or a hash of the prompt.
        system_prompt: goes before every prompt that has no system message.
        template: plain template such as `Question: {question}\\nAnswer:`, which may name any column; by default the
            tokenizer's chat template, or the plain text if it has none.
        chat_template_kwargs: arguments of the chat template, e.g. `{enable_thinking: false}`.
        max_prompt_length: prompts of more tokens are dropped and counted.
        limit: number of rows to read, from the start.
        sample_size: number of prompts to keep, a random sample that is the same in every run; null for all of them.
        weight: weight of this source among several (see `data.mixture`); null for its number of prompts.
        rewards: names of those of model.rewards that score these prompts (a reward's `name`, by default its class or
            function in lower case); null for all of them.
        glob: whether `path` is a pattern such as `shards/*.jsonl`, whose files are read in the order of their names;
            `**` matches folders.
        encoding: of text files, e.g. `gbk` or `latin-1`; null for UTF-8.
    """

    def __init__(
        self,
        path: str | list[str],
        split: str = "train",
        name: str | None = None,
        prompt_column: str | None = None,
        answer_column: str | None = "auto",
        answer_format: Literal["auto", "verbatim", "gsm8k", "boxed", "set"] = "auto",
        id_column: str | None = None,
        system_prompt: str = "",
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        limit: int | None = None,
        weight: float | None = None,
        rewards: list[str] | None = None,
        glob: bool = False,
        encoding: str | None = None,
        sample_size: int | None = None,
    ) -> None:
        super().__init__(system_prompt, template, chat_template_kwargs, max_prompt_length, weight, rewards)
        self._check_positive(limit=limit, sample_size=sample_size)
        if not path:
            raise UserError("PromptFile path is empty. Name a file, a folder or a hub data set.")
        self.path, self.name, self.split, self.limit, self.glob = path, name, split, limit, glob
        self.encoding, self.sample_size = encoding, sample_size
        self.overrides = SchemaOverrides(prompt_column, answer_column, answer_format, id_column)

    def load(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptPool:
        paths = [self.path] if isinstance(self.path, str) else self.path
        if self.glob:
            paths = [file for pattern in paths for file in matching(pattern)]
        source = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        named = [self.overrides.prompt_column, self.overrides.named_answer, self.overrides.id_column]
        options = FileOptions(tuple(column for column in named if column is not None), self.encoding)
        read = [(path, open_table(path, self.name, self.split, options)) for path in paths]
        table = ranges([(one, 0, len(one)) for _, one in read])
        if self.limit is not None:
            table = ranges([(table, 0, min(self.limit, len(table)))])
        probe = table.rows(range(min(PROBE, len(table))))
        schema = detect(table.columns, probe, self.overrides, source)
        self._check_same_columns([(one.file or path, one) for path, table in read for one in files_of(table)], schema)
        pool = read_pool(table, schema, self.renderer(tokenizer), source, self.max_prompt_length, self.context_limit)
        if self.sample_size is None or pool.report is None:
            return pool
        sample = sample_pool(pool, self.sample_size, "sample")
        sample.report = replace(pool.report, kept=len(sample))
        return sample

    def _check_same_columns(self, files: Sequence[tuple[str, Table]], schema: Schema) -> None:
        """Raise UserError if a file lacks the prompt, answer or choices that another one has."""
        for column in (schema.prompt, schema.answer, *schema.choices):
            head = (column or "").split(".")[0]
            having = [any(name.split(".")[0] == head for name in one.columns) for _, one in files]
            if column is not None and not all(having):
                (lacking, one), (other, _) = files[having.index(False)], files[having.index(True)]
                raise UserError(
                    f"{lacking} has no column {column!r}, which {other} has: its columns are "
                    f"{', '.join(map(repr, one.columns))}. Make it a source of its own, or rename the column."
                )
