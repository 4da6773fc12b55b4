"""Success rates in the layouts in which people publish them: rows of a JSONL or parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.errors import UserError, nearest

TRACE = "pass_rate_by_epoch"
RATES = ("pass_rate", "solve_rate", "success_rate", "llama8b_solve_rate")
"""Columns of one rate; the last one is Big-Math's."""
DIFFICULTY = "model_difficulty"
"""Skywork-OR1's column: how many of 16 answers of each model were wrong (its issue 40; its scripts keep 1 to 15)."""
ATTEMPTS = 16
METRICS = ("exact_match", "acc_norm", "acc", "pass@1")
"""Metrics of lm-eval-harness's samples, of which the first counts where the row does not name its own."""
QUESTIONS = ("question", "problem", "prompt", "query", "input")

EXPECTED = (
    f"a question ({', '.join(QUESTIONS)}) with {TRACE} (a list of rates or null), one rate ({', '.join(RATES)}), "
    f"{DIFFICULTY} (Skywork), or doc with a metric (lm-eval-harness)"
)


def read_row(row: Mapping[str, Any], where: str) -> tuple[str, dict[str, float]]:
    """Return the question of a row and its rates in [0, 1] by the name of the visit or model.

    Rows are `{"question", "pass_rate_by_epoch": [...]}`, `{"problem", "llama8b_solve_rate": ...}` (Big-Math; null where
    not measured), `{"prompt": [...], "extra_info": {"model_difficulty": {MODEL: wrong of 16}}}` (Skywork-OR1), or
    `{"doc": {...}, "metrics": ["exact_match"], "exact_match": 1.0}` (samples of lm-eval-harness and of the open
    leaderboards).

    Raises:
        UserError: no such column, or a value that is not a rate; `where` names the row.
    """
    inner = row.get("extra_info")
    flat = {**inner, **row} if isinstance(inner, Mapping) else dict(row)
    doc = flat.get("doc")
    found: dict[str, Any]
    if TRACE in flat:
        trace = flat[TRACE]
        found = (
            {f"{visit:06d}": rate for visit, rate in enumerate(trace)} if isinstance(trace, list) else {"": str(trace)}
        )
    elif isinstance(flat.get(DIFFICULTY), Mapping):
        found = {
            model: 1 - wrong / ATTEMPTS if isinstance(wrong, int | float) else wrong
            for model, wrong in flat[DIFFICULTY].items()
        }
    elif isinstance(doc, Mapping):
        metrics = flat.get("metrics") or METRICS
        found = next(({"": flat[name]} for name in metrics if name in flat), {"": "no metric"})
        flat = dict(doc)
    else:
        name = next((name for name in RATES if name in flat), None)
        if name is None:
            raise UserError(
                f"{where} has the columns {', '.join(map(str, row))}, none of them a known success rate: "
                f"{nearest(TRACE, row)} Expected {EXPECTED}."
            )
        found = {name: flat[name]}
    question = next((flat[name] for name in QUESTIONS if name in flat), None)
    if isinstance(question, list):  # a conversation: what its last user asks
        turns = [turn.get("content") for turn in question if isinstance(turn, Mapping) and turn.get("role") == "user"]
        question = turns[-1] if turns else None
    measured = {
        name: rate for name, rate in found.items() if rate is not None and rate == rate
    }  # parquet's null is NaN
    if not isinstance(question, str) or not all(
        isinstance(rate, int | float) and 0 <= rate <= 1 for rate in measured.values()
    ):
        raise UserError(f"{where} holds {str(row)[:60]!r}, expected rates in [0, 1] or null, and {EXPECTED}.")
    return question, {name: float(rate) for name, rate in measured.items()}
