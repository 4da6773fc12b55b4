"""Writes prompts of a pool to a file from which `PromptFile` restores ids, questions, prompts and columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.jsonl import dumps
from datamodules.prompts.file import PromptFile, PromptSource
from datamodules.prompts.schemas import SUBSET_ID
from datamodules.types import Prompt

_PROMPT = "prompt"


def write_subset(prompts: Sequence[Prompt], path: Path) -> None:
    """Write one JSON object per line: `prompt` (the question before any template, or messages), an id, all columns.

    A column that JSON and Arrow would change (objects with different keys from row to row, tuples) is written as JSON
    text, which `rewards.ReasoningGym` reads. The file is replaced atomically.

    Raises:
        UserError: JSON cannot hold a column.
    """
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    columns = {name: _column(name, prompts) for name in names}
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as file:
        for row, prompt in enumerate(prompts):
            raw = prompt.question if isinstance(prompt.prompt, str) else prompt.prompt
            rest = {name: values[row] for name, values in columns.items() if name not in (_PROMPT, SUBSET_ID)}
            file.write(dumps({SUBSET_ID: prompt.id, _PROMPT: raw, **rest}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def subset_options(path: Path, source: PromptSource | None) -> dict[str, Any]:
    """Return the arguments with which `PromptFile` renders a subset of `source` as `source` did."""
    names = ("system_prompt", "template", "chat_template_kwargs")
    rendering = {} if source is None else {name: getattr(source, name) for name in names}
    return {
        "path": str(path),
        "split": "train",
        "name": None,
        "prompt_column": _PROMPT,
        "answer_column": "auto",
        "answer_format": "verbatim",
        "id_column": SUBSET_ID,
        **rendering,
        "max_prompt_length": None,
        "limit": None,
    }


def check_subset(options: dict[str, Any], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the file back and compare id, question, text and tokens of every prompt.

    Raises:
        UserError: a prompt differs or is missing.
    """
    path, found = options["path"], PromptFile(**options).load(tokenizer, seed=0)
    for expected, prompt in zip(prompts, found, strict=False):
        for name in ("id", "question", "prompt", "token_ids"):
            if getattr(expected, name) != getattr(prompt, name):
                raise UserError(
                    f"{path}: prompt {expected.id!r} has another {name} when read back, because its source renders "
                    "prompts differently from PromptFile. Use a source that PromptFile can replace."
                )
    if len(found) != len(prompts):
        raise UserError(
            f"{path}: {len(prompts)} prompts were written, but {len(found)} were read back ({found.report}). "
            "Remove prompts that differ only in their template."
        )


def _column(name: str, prompts: Sequence[Prompt]) -> list[object]:
    """Return a column's values, as JSON text if Arrow would change them."""
    values = [prompt.columns.get(name) for prompt in prompts]
    texts: list[object]
    try:
        texts = [value if value is None or isinstance(value, str) else dumps(value) for value in values]
    except TypeError as error:
        raise UserError(f"Column {name!r} cannot be written as JSON ({error}). Remove it from the data.") from error
    try:
        unchanged = bool(pa.array(values).to_pylist() == values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        unchanged = False
    return values if unchanged else texts
