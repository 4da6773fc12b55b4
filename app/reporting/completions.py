"""Completions as rows of a table, with what one needs to judge them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.reporting.loggers.base import Cell
from app.reporting.validation import CORRECT
from app.rewards.answers import GOLD_COLUMNS, gold_answers, plain, whole_text
from datamodules.types import Messages, RolloutGroup

Row = dict[str, Any]
_SHOWN_CHARACTERS = 2000
_TASKS = ("data_source", "task", "source_dataset")
"""Columns that say which part of the data a prompt is from, also within `metadata` and `extra_info`."""
_SAME = ("question", "prompt", "answer", "solution", "ground_truth")
"""Columns of a prompt that repeat its text or its answer unless the data has others of these names."""


def rows_of(
    groups: Sequence[RolloutGroup],
    step: int,
    golds: Sequence[str],
    advantages: Sequence[np.ndarray],
    forecast: Mapping[str, float],
    decode: Callable[[np.ndarray], str],
) -> Iterator[Row]:
    """Yield a row for each completion.

    Conversations with an environment have their messages in `turns`, as JSON, and in `context` what the policy read in
    place of the prompt, if that was something else.

    Args:
        groups: groups of completions.
        step: the step that they belong to.
        golds: columns from which the rewards read reference answers, before the usual ones.
        advantages: float32 `[G]` for each group; empty if they were not trained on.
        forecast: the selector's expected success rate by prompt id.
        decode: returns the text of tokens, int32 `[T]`.
    """
    for position, group in enumerate(groups):
        prompt, text = group.prompt, text_of_prompt(group.prompt.prompt)
        answer, expected = reference_answer(prompt.columns, golds), forecast.get(prompt.id)
        known = {
            "prompt_id": prompt.id,
            "task": prompt.dataset or task_of(prompt.columns),
            "question": prompt.question,
            "prompt": text,
            "answer": answer,
            "forecast": None if expected is None or np.isnan(expected) else float(expected),
        }
        repeated = {prompt.question, text, answer}
        own = {
            name: cell
            for name, value in prompt.columns.items()
            if not ((cell := _cell(value)) in repeated and name in _SAME)
        }
        for sample, completion in enumerate(group.completions):
            row: Row = {
                "step": step,
                **known,
                "completion": completion.text,
                "reward": float(group.rewards[sample]),
                "correctness": float(group.correctness[sample]),
                "advantage": float(advantages[position][sample]) if advantages else None,
                "source": group.source,
                "birth_step": group.birth_step,
                "policy_version": completion.policy_version,
                "finish_reason": completion.finish_reason,
                "completion_tokens": completion.generated_tokens,
            }
            if completion.turns:
                messages = [message for turn in completion.turns for message in turn.messages]
                row["turns"] = json.dumps(messages, ensure_ascii=False)
            if completion.context is not None:
                row["context"] = decode(completion.context)
            row |= {f"reward/{name}": float(values[sample]) for name, values in group.components.items()}
            row |= {name if name not in row else f"data/{name}": value for name, value in own.items()}
            row |= {
                name if name not in row else f"extra/{name}": values[sample] for name, values in group.extras.items()
            }
            yield row


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows to a parquet file, whose columns are those of all rows; nothing without rows."""
    if rows:
        file.parent.mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys(column for row in rows for column in row)
        pq.write_table(pa.table({name: _column([row.get(name) for row in rows]) for name in names}), file)


def shown_rows(rows: Sequence[Row], count: int) -> list[dict[str, Cell]]:
    """Return the completions to look at: one of each prompt, wrong ones first, spread over the prompts.

    Long texts are cut in their middle.
    """
    worst: dict[str, Row] = {}
    for row in rows:
        if row["prompt_id"] not in worst or row["reward"] < worst[row["prompt_id"]]["reward"]:
            worst[row["prompt_id"]] = row
    wrong = [row for row in worst.values() if row["correctness"] <= CORRECT]
    right = [row for row in worst.values() if row["correctness"] > CORRECT]
    chosen = _spread(wrong, count)
    chosen += _spread(right, count - len(chosen))
    return [
        {
            "result": "right" if row["correctness"] > CORRECT else "wrong",
            "reward": row["reward"],
            "answer": cut(row["answer"] or ""),
            "forecast": row["forecast"],
            "task": row["task"],
            "prompt_id": row["prompt_id"],
            "source": row["source"],
            "finish_reason": row["finish_reason"],
            "prompt": cut(row.get("context") or row["prompt"]),
            "completion": cut(whole_text(json.loads(row["turns"])) if row.get("turns") else row["completion"]),
        }
        for row in chosen
    ]


def reference_answer(columns: Mapping[str, object], golds: Sequence[str] = ()) -> str | None:
    """Return the first reference answer of a prompt's columns as text, or None without any.

    `golds` are columns to look into before the usual ones; a dot leads into a nested column.
    """
    present = {name: [value] for name, value in columns.items()}
    for name in (*golds, *GOLD_COLUMNS):
        if name.split(".")[0] in present and (found := gold_answers(present, 1, name)[0]):
            return " or ".join(found)
    return None


def task_of(columns: Mapping[str, object]) -> str | None:
    """Return the part of the data that a prompt is from, or None where its columns do not tell."""
    nested = [value for name in ("metadata", "extra_info") if isinstance(value := columns.get(name), Mapping)]
    found = (part.get(name) for part in (columns, *nested) for name in _TASKS)
    return next((one for one in found if isinstance(one, str) and one), None)


def text_of_prompt(prompt: str | Messages) -> str:
    """Return a prompt as text; a conversation as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def cut(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """Return a text of at most about this length: beginning and end of a longer one."""
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} [...] {text[-half:]}"


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` rows at even distances, or all if there are fewer."""
    if len(rows) <= count:
        return list(rows)
    return [rows[place * len(rows) // count] for place in range(count)]


def _cell(value: object) -> object:
    """Return a value of the data as a cell: nested ones as JSON text."""
    value = plain(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _column(values: list[Any]) -> pa.Array:
    """Return values as a column; as text if they are of several types, or what no type holds."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError):
        texts = (None if value is None else str(value).encode("utf-8", "replace").decode() for value in values)
        return pa.array(texts, pa.string())
