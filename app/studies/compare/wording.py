"""Figures of a comparison as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.ledger import PHASES

Row = list[str]


def ratio_text(figure: Mapping[str, Any]) -> str:
    """`0.48 [0.41, 0.57]`; `>= 0.9 (1 of 3 reached)` where seeds never got there; `-` where there is nothing."""
    if figure["mean"] is None:
        return "no goal: the baseline ended where it began" if figure["undefined"] else "-"
    text = f"{'>= ' if figure['at_least'] else ''}{figure['mean']:.2f}{interval_text(figure, 2)}"
    notes = []
    if figure["censored"]:
        notes.append(f"{figure['reached']} of {figure['reached'] + figure['censored']} reached")
    if figure["undefined"]:
        notes.append(f"{figure['undefined']} without a goal")
    return text + (f" ({'; '.join(notes)})" if notes else "")


def number_text(figure: Mapping[str, Any], digits: int = 3, signed: bool = False) -> str:
    """`0.812 [0.790, 0.834]`, or `-`."""
    if figure["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    return f"{figure['mean']:{sign}.{digits}f}{interval_text(figure, digits)}"


def interval_text(figure: Mapping[str, Any], digits: int) -> str:
    """` [low, high]`, or nothing where there is no interval."""
    bounds = figure["ci95"]
    return "" if bounds is None else f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def ceiling_lines(ceiling: Mapping[str, Any], baseline: str) -> list[str]:
    """What choosing could save, in a sentence; nothing where the baseline's completions are not on record."""
    if ceiling["time_ratio"]["mean"] is None:
        return []
    return [
        f"What choice alone could save: {baseline} without the rollouts of its uninformative groups would take "
        f"{number_text(ceiling['time_ratio'], 2)} of its time ({number_text(ceiling['informative_tokens'], 2)} of the "
        "tokens that it rolled out, where completions are on record, were in informative groups). Below that an arm "
        "comes only if its groups teach more than those of the baseline."
    ]


def cost_table(arms: Mapping[str, Any], part: str | None) -> tuple[Row, list[Row]]:
    """Head and rows: what reaching a goal cost; `part` is a key of the arm's figures, None for the final accuracy."""
    head = ["arm", "time", "completions", "completion tokens", "steps"]
    names = ("time_ratio", "completion_ratio", "token_ratio", "step_ratio")

    def cells(arm: Mapping[str, Any]) -> Row:
        found = arm if part is None else arm[part]
        return [ratio_text(found[name]) for name in names]

    return head, [[name, *cells(arm)] for name, arm in arms.items()]


def short_table(arms: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Head and rows for a terminal: the costs of the final accuracy, and what the arms themselves ended with."""
    head, rows = cost_table(arms, None)
    results = [
        [number_text(arm["final_accuracy"]), number_text(arm["accuracy_gain"], signed=True)] for arm in arms.values()
    ]
    return [*head, "final accuracy", "gain"], [row + result for row, result in zip(rows, results, strict=True)]


def result_table(arms: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Head and rows: accuracy, informative fractions, forecast, and what was rolled out."""
    head = [
        "arm", "runs", "final accuracy", "gain", "best accuracy", "informative, rolled out", "informative, trained on",
        "forecast Pearson", "steps", "completions", "completion tokens",
    ]  # fmt: skip

    def cells(arm: Mapping[str, Any]) -> Row:
        totals = arm["totals"]
        return [
            str(arm["runs"]),
            number_text(arm["final_accuracy"]),
            number_text(arm["accuracy_gain"], signed=True),
            number_text(arm["best_accuracy"]),
            number_text(arm["fresh_informative_fraction"], 2),
            number_text(arm["informative_fraction"], 2),
            number_text(arm["forecast_pearson"], 2),
            *(f"{totals[name]:,.0f}" for name in ("steps", "completions", "completion_tokens")),
        ]

    return head, [[name, *cells(arm)] for name, arm in arms.items()]


def seconds_table(arms: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Head and rows: seconds of a whole run, mean over seeds; those of the clock first, then those outside of it."""
    names = ["training", *PHASES]
    return ["arm", *names], [[name, *(f"{arm['seconds'][one]:.1f}" for one in names)] for name, arm in arms.items()]


def seed_table(arms: Mapping[str, Any], baseline: str) -> tuple[Row, list[Row]]:
    """Head and rows: every arm's time ratio and final accuracy seed by seed; `>` marks what was never reached."""
    seeds = sorted({seed for arm in arms.values() for seed in arm["final_accuracy"]["per_seed"]}, key=int)

    def cell(arm: Mapping[str, Any], seed: str) -> str:
        accuracy = arm["final_accuracy"]["per_seed"].get(seed)
        if accuracy is None:
            return "not run"
        found = arm["time_ratio"]["per_seed"].get(seed)
        if found is None:
            return f"{accuracy:.3f}, {baseline} not run"
        if found["ratio"] is None:
            return f"{accuracy:.3f}, no goal"
        return f"{'' if found['reached'] else '> '}{found['ratio']:.2f}, {accuracy:.3f}"

    return ["arm", *(f"seed {seed}" for seed in seeds)], [
        [name, *(cell(arm, seed) for seed in seeds)] for name, arm in arms.items()
    ]


def setting_lines(setting: Mapping[str, Any]) -> list[str]:
    """What was compared, in sentences."""
    machines = setting["machines"]
    lines = [
        f"Base: {', '.join(setting['base'])}. Seeds: {', '.join(map(str, setting['seeds']))}. "
        f"Budget: {setting['budget']}.",
        setting["method"],
        *("Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "." for machine in machines),
    ]
    if len(machines) > 1:
        lines.append("The runs were not all made on the same machine with the same software: times cannot be compared.")
    if setting["missing"]:
        lines.append(f"Not finished, so not in these figures: {', '.join(setting['missing'])}.")
    return lines
