"""A comparison as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from app.studies.compare.charts import FORECAST, INFORMATIVE, PHASES, accuracy_charts, metric_charts, phase_charts
from app.studies.compare.records import Comparison
from app.studies.compare.style import STYLE, arm_style, part_style
from app.studies.compare.wording import (
    Row,
    ceiling_lines,
    cost_table,
    result_table,
    seconds_table,
    seed_table,
    setting_lines,
)


def page(comparison: Comparison, figures: dict[str, Any]) -> str:
    """The whole file."""
    arms = [arm.name for arm in comparison.request.arms]
    baseline = comparison.request.baseline
    title = f"What it takes to match {escape(baseline)}"
    styles = STYLE + arm_style(arms, baseline) + part_style(len(PHASES) + 1)
    body = "\n".join(_body(comparison, figures))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{styles}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(comparison: Comparison, figures: dict[str, Any]) -> Iterator[str]:
    setting, arms = figures["setting"], figures["arms"]
    baseline = setting["baseline"]
    goal = arms[baseline]["final_accuracy"]["mean"] if baseline in arms else None
    yield "".join(f'<p class="setting">{escape(line)}</p>' for line in setting_lines(setting))
    yield f"<h2>Cost of the final accuracy of {escape(baseline)}, over its own</h2>"
    yield _table(*cost_table(arms, None))
    yield "".join(f"<p>{escape(line)}</p>" for line in ceiling_lines(figures["perfect_choice"], baseline))
    yield _legend([arm.name for arm in comparison.request.arms])
    yield '<div class="charts">'
    yield _chart("accuracy", "Accuracy", "against", accuracy_charts(comparison, goal))
    yield _chart("phases", "Seconds by phase", "", phase_charts(arms), _phase_names())
    informative = metric_charts(comparison, INFORMATIVE, "informative fraction")
    yield _chart("informative", "Groups that teach", "of those", informative)
    yield _chart("forecast", "Forecast quality", "", metric_charts(comparison, FORECAST))
    yield "</div>"
    yield "<h2>What came out</h2>" + _table(*result_table(arms))
    yield f"<h2>Cost of the best accuracy of {escape(baseline)}, over its own</h2>" + _table(
        *cost_table(arms, "to_best")
    )
    yield f"<h2>Cost of the final accuracy, over the whole run of {escape(baseline)}</h2>"
    yield "<p>The form in which the paper of DOTS + RR reports (arXiv 2506.05316).</p>"
    yield _table(*cost_table(arms, "share_of_baseline_run"))
    yield "<h2>Seed by seed</h2><p>Time ratio (&gt;: never reached, at least so much), final accuracy.</p>"
    yield _table(*seed_table(arms, baseline))
    yield "<h2>Seconds of a run</h2><p>validate and checkpoint are outside of the training clock.</p>"
    yield _table(*seconds_table(arms))
    yield f"<h2>In what the arms differ from {escape(baseline)}</h2>"
    for name, lines in setting["differences"].items():
        items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines)
        yield f"<details><summary>{escape(name)}</summary><ul>{items}</ul></details>"


def _legend(arms: Sequence[str]) -> str:
    """A box per arm that shows and hides its curves."""
    boxes = "".join(
        f'<label class="arm-{place}"><input type="checkbox" id="arm-{place}" checked><i></i>{escape(name)}</label>'
        for place, name in enumerate(arms)
    )
    return f'<div class="legend">{boxes}</div>'


def _phase_names() -> str:
    names = "".join(f'<span><i class="part-{place}"></i>{name}</span>' for place, name in enumerate((*PHASES, "other")))
    return f'<p class="parts">{names}</p>'


def _chart(key: str, title: str, before: str, charts: Mapping[str, str], below: str = "") -> str:
    """One chart of several, chosen by radio buttons."""
    buttons = "".join(
        f'<input type="radio" name="{key}" id="{key}-{place}"{" checked" if place == 0 else ""}>'
        f'<label for="{key}-{place}">{escape(label)}</label>'
        for place, label in enumerate(charts)
    )
    panes = "".join(f'<div class="pane">{chart}</div>' for chart in charts.values())
    return f'<section><h3>{title}</h3><div class="tabs"><em>{before}</em>{buttons}{panes}</div>{below}</section>'


def _table(head: Row, rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
