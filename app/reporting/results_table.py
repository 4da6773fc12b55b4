"""A Markdown table of what was measured: a row for each set, and their mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from app.reporting.bootstrap import DRAWS, LEVEL

_AT_K = re.compile(r"(pass|maj)@(\d+)")
_AVERAGE = re.compile(r"avg@(\d+)")


def results_table(
    stage: str, sets: Sequence[str], metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]
) -> str:
    """Return the table, in percent: accuracy, pass@k and maj@k with their intervals.

    Args:
        stage: the prefix of the mean over sets, e.g. "test".
        sets: the prefixes of the sets, e.g. "test/gsm8k"; `[stage]` where there is one only.
        metrics: the metrics by name.
        intervals: [low, high] of those that have one, by name.
    """
    prefixes = [*sets, *([] if stage in sets else [stage])]
    own = {
        prefix: {
            name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(f"{prefix}/")
        }
        for prefix in prefixes
    }
    at_k = {match.groups() for one in own.values() for name in one if (match := _AT_K.fullmatch(name))}
    columns = [f"{kind}@{k}" for kind in ("pass", "maj") for k in sorted(int(k) for one, k in at_k if one == kind)]
    lines = [
        f"| {' | '.join(['set', 'prompts', 'n', 'avg@n', *columns])} |",
        f"|---|{'---:|' * (3 + len(columns))}",
    ]
    for prefix, one in own.items():
        counted = [match[1] for name in one if (match := _AVERAGE.fullmatch(name))]
        shown = "mean" if prefix == stage and stage not in sets else prefix.partition("/")[2] or prefix
        cells = [shown, f"{one.get('prompts', 0):.0f}", *(counted or [""])]
        for name in ("accuracy", *columns):
            bounds = intervals.get(f"{prefix}/{name}")
            within = "" if bounds is None else f" [{bounds[0]:.1%}, {bounds[1]:.1%}]".replace("%", "")
            cells.append("" if name not in one else f"{one[name]:.1%}".replace("%", "") + within)
        lines.append(f"| {' | '.join(cells)} |")
    told = f"In percent, with {LEVEL:.0%} intervals by bootstrap over prompts ({DRAWS:,} draws)."
    return "\n".join([*lines, "", told]) + "\n"
