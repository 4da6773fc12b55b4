"""A comparison as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.studies.compare.wording import (
    Row,
    ceiling_lines,
    cost_table,
    result_table,
    seconds_table,
    seed_table,
    setting_lines,
)


def markdown(figures: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join(_lines(figures)) + "\n"


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    setting, arms = figures["setting"], figures["arms"]
    baseline = setting["baseline"]
    yield f"# What it takes to match {baseline}\n"
    for line in setting_lines(setting):
        yield f"{line}\n"
    yield f"## To the final accuracy of {baseline}\n"
    yield f"Of what {baseline} needed to get there itself (its own first time by the same rule).\n"
    yield from _table(*cost_table(arms, None))
    for line in ceiling_lines(figures["perfect_choice"], baseline):
        yield f"{line}\n"
    yield f"## To the best accuracy of {baseline}\n"
    yield from _table(*cost_table(arms, "to_best"))
    yield f"## To the final accuracy, of the whole run of {baseline}\n"
    yield "The form in which the paper of DOTS + RR reports (arXiv 2506.05316).\n"
    yield from _table(*cost_table(arms, "share_of_baseline_run"))
    yield "## What came out\n"
    yield from _table(*result_table(arms))
    yield "## Seconds of a run\n"
    yield "`validate` and `checkpoint` are outside of the training clock.\n"
    yield from _table(*seconds_table(arms))
    yield "## Seed by seed\n"
    yield "Time ratio to the final accuracy (`>`: never reached, at least so much) and the arm's own final accuracy.\n"
    yield from _table(*seed_table(arms, baseline))
    yield f"## In what the arms differ from {baseline}\n"
    for name, lines in setting["differences"].items():
        yield f"- **{name}** ({', '.join(setting['arms'][name])})"
        yield from (f"  - `{line}`" for line in lines)


def _table(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
