"""Writes some prompts of a pool as a file that `PromptFile` reads back unchanged: ids, questions, prompts, columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from datamodules.errors import UserError
from datamodules.prompts.exact_json import dumps
from datamodules.prompts.file import PromptFile, PromptSource
from datamodules.prompts.schemas import SUBSET_ID
from datamodules.types import Prompt

_PROMPT = "prompt"


def write_subset(prompts: Sequence[Prompt], path: Path) -> None:
    """One JSON object per line: `prompt` (the question before any template, or the messages), an id, every column.

    A column that JSON and Arrow would change (objects with different keys from row to row, tuples) is written as JSON
    text, which `rewards.Procedural` reads. The file is there whole or not at all.

    Raises UserError for a column that JSON cannot hold.
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
    """The arguments with which `PromptFile` reads a subset of `source` as `source` itself was read."""
    taken = ("system_prompt", "template", "chat_template_kwargs")
    return {
        "path": str(path),
        "split": "train",
        "name": None,
        "prompt_column": _PROMPT,
        "answer_column": None,
        "answer_format": "verbatim",
        "id_column": SUBSET_ID,
        **{name: getattr(source, name) for name in taken if hasattr(source, name)},
        "max_prompt_length": None,
        "limit": None,
    }


def check_subset(options: dict[str, Any], prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Reads the file back. Raises UserError unless every prompt is the same: id, question, text and tokens."""
    found = PromptFile(**options).load(tokenizer, seed=0)
    for expected, prompt in zip(prompts, found, strict=False):
        for name in ("id", "question", "prompt", "token_ids"):
            if getattr(expected, name) != getattr(prompt, name):
                raise UserError(
                    f"{options['path']}: prompt {expected.id!r} comes back with another {name}: its source renders "
                    "prompts in a way that PromptFile does not know"
                )
    if len(found) != len(prompts):
        raise UserError(f"{options['path']}: {len(prompts)} prompts written, {len(found)} read back: {found.report}")


def _column(name: str, prompts: Sequence[Prompt]) -> list[Any]:
    values = [prompt.columns.get(name) for prompt in prompts]
    try:
        texts = [value if value is None or isinstance(value, str) else dumps(value) for value in values]
    except TypeError as error:
        raise UserError(f"column {name!r} cannot be written as JSON ({error}): leave it out of the data") from error
    return values if _kept_by_arrow(values) else texts


def _kept_by_arrow(values: list[Any]) -> bool:
    try:
        return bool(pa.array(values).to_pylist() == values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return False
