"""The figures of a comparison as tables, sentences and a Markdown page."""

from __future__ import annotations

import pandas as pd

from app.studies.compare.figures import RATIOS, Figures
from datamodules.ledger import PHASES


def sections(figures: Figures) -> list[tuple[str, str, pd.DataFrame]]:
    """Return heading, note and table of each section.

    The first is the cost to the final accuracy, where there is more than one arm.
    """
    arms, baseline = figures["arms"], figures["setting"]["baseline"]
    names = ["training", *(phase for phase in PHASES if any(arm["seconds"][phase] for arm in arms.values()))]
    seconds = {name: {one: f"{arm['seconds'][one]:.1f}" for one in names} for name, arm in arms.items()}
    last = ("Seconds of a run", "The training clock excludes validate and checkpoint.", _table(seconds))
    if is_alone(figures):
        return [("Results", "", _result_table(arms).drop(columns="gain")), last]
    first = f"Relative to the cost at which {baseline} first reached it."
    best, whole = ({name: arm[part] for name, arm in arms.items()} for part in ("to_best", "share_of_baseline_run"))
    paper = "The form in which the paper of DOTS + RR reports (arXiv 2506.05316)."
    per_seed = "Time ratio to the final accuracy (>: never reached, a lower bound) and the arm's own final accuracy."
    return [
        (f"Cost to the final accuracy of {baseline}", first, _cost_table(arms)),
        ("Results", "", _result_table(arms)),
        (f"Cost to the best accuracy of {baseline}", first, _cost_table(best)),
        (f"Cost to the final accuracy, relative to the whole run of {baseline}", paper, _cost_table(whole)),
        ("Seed by seed", per_seed, _seed_table(arms, baseline)),
        last,
    ]


def is_alone(figures: Figures) -> bool:
    """Return whether a single arm was asked for, which has nothing to be relative to."""
    return len(figures["setting"]["arms"]) == 1


def short_table(figures: Figures) -> pd.DataFrame:
    """Return the cost of the final accuracy and the accuracy that each arm ended with, for a terminal."""
    arms = figures["arms"]
    if is_alone(figures):
        return _result_table(arms)[["runs", "final accuracy", "best accuracy"]]
    return _cost_table(arms).join(_result_table(arms)[["final accuracy", "gain"]])


def markdown(figures: Figures) -> str:
    """Return the report as a Markdown page."""
    setting = figures["setting"]
    paragraphs = [f"# {title_of(figures)}", *setting_lines(setting)]
    for place, (title, note, table) in enumerate(sections(figures)):
        rows = [["arm", *table], ["---", *["---:"] * len(table.columns)]]
        rows += [[name, *cells] for name, cells in zip(table.index, table.values.tolist(), strict=True)]
        paragraphs += [f"## {title}", note, "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        if place == 0:
            paragraphs.append(ceiling_line(figures))
    if is_alone(figures):
        return "\n\n".join(filter(None, paragraphs)) + "\n"
    paragraphs.append(f"## Settings that differ from {setting['baseline']}")
    for name, lines in setting["differences"].items():
        items = "".join(f"\n  - `{line}`" for line in lines)
        paragraphs.append(f"- **{name}** ({', '.join(setting['arms'][name])}){items}")
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def title_of(figures: Figures) -> str:
    """Return the heading of the report."""
    baseline, seeds = figures["setting"]["baseline"], figures["setting"]["seeds"]
    return f"{baseline} over {len(seeds)} seeds" if is_alone(figures) else f"What it takes to match {baseline}"


def setting_lines(setting: Figures) -> list[str]:
    """Return sentences that say what was compared, by which rules and on which machines."""
    machines = setting["machines"]
    lines = [
        f"Base: {', '.join(setting['base'])}. Seeds: {', '.join(map(str, setting['seeds']))}. "
        f"Budget: {setting['budget']}.",
        setting["method"],
        *("Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "." for machine in machines),
    ]
    if len(machines) > 1:
        lines.append("Machine or software differ between runs, so times cannot be compared.")
    if setting["missing"]:
        lines.append(f"Not finished and not in these figures: {', '.join(setting['missing'])}.")
    return lines


def ceiling_line(figures: Figures) -> str:
    """Return a sentence on what perfect choice would save; nothing when the baseline's completions are unknown."""
    ceiling, baseline = figures["perfect_choice"], figures["setting"]["baseline"]
    if ceiling["time_ratio"]["mean"] is None:
        return ""
    return (
        f"Perfect choice: without the rollouts of its uninformative groups, {baseline} would take "
        f"{number_text(ceiling['time_ratio'], 2)} of its time ({number_text(ceiling['informative_tokens'], 2)} of its "
        "rolled-out tokens were in informative groups, where completions were written). An arm is faster than that "
        f"only if its groups teach more than those of {baseline}."
    )


def ratio_text(figure: Figures) -> str:
    """Format a ratio: `0.48 [0.41, 0.57]`, `>= 0.90 (1 of 3 reached)` for a lower bound, `-` for nothing."""
    if figure["mean"] is None:
        return "no goal: the baseline ended where it began" if figure["undefined"] else "-"
    notes = []
    if figure["censored"]:
        notes.append(f"{figure['reached']} of {figure['reached'] + figure['censored']} reached")
    if figure["undefined"]:
        notes.append(f"{figure['undefined']} without a goal")
    bound = ">= " if figure["at_least"] else ""
    return f"{bound}{number_text(figure, 2)}" + (f" ({'; '.join(notes)})" if notes else "")


def number_text(figure: Figures, digits: int = 3, sign: str = "") -> str:
    """Format a mean and its interval: `0.812 [0.790, 0.834]`, or `-`."""
    if figure["mean"] is None:
        return "-"
    interval = f" [{', '.join(f'{bound:.{digits}f}' for bound in figure['ci95'])}]" if figure["ci95"] else ""
    return f"{figure['mean']:{sign}.{digits}f}{interval}"


def _table(rows: dict[str, dict[str, str]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(columns="arm")


def _cost_table(arms: Figures) -> pd.DataFrame:
    heads = dict(zip(("time", "completions", "completion tokens", "steps"), RATIOS.values(), strict=True))
    return _table({name: {head: ratio_text(arm[one]) for head, one in heads.items()} for name, arm in arms.items()})


def _result_table(arms: Figures) -> pd.DataFrame:
    return _table(
        {
            name: {
                "runs": str(arm["runs"]),
                "final accuracy": number_text(arm["final_accuracy"]),
                "gain": number_text(arm["accuracy_gain"], sign="+"),
                "best accuracy": number_text(arm["best_accuracy"]),
                "informative, rolled out": number_text(arm["fresh_informative_fraction"], 2),
                "informative, trained on": number_text(arm["informative_fraction"], 2),
                "forecast Pearson": number_text(arm["forecast_pearson"], 2),
                "steps": f"{arm['totals']['steps']:,.0f}",
                "completions": f"{arm['totals']['completions']:,.0f}",
                "completion tokens": f"{arm['totals']['completion_tokens']:,.0f}",
            }
            for name, arm in arms.items()
        }
    )


def _seed_table(arms: Figures, baseline: str) -> pd.DataFrame:
    seeds = sorted({seed for arm in arms.values() for seed in arm["final_accuracy"]["per_seed"]}, key=int)
    rows: dict[str, dict[str, str]] = {}
    for name, arm in arms.items():
        rows[name] = cells = dict.fromkeys((f"seed {seed}" for seed in seeds), "not run")
        for seed, accuracy in arm["final_accuracy"]["per_seed"].items():
            found = arm["time_ratio"]["per_seed"].get(seed)
            if found is None:
                cells[f"seed {seed}"] = f"{accuracy:.3f}, {baseline} not run"
            elif found["ratio"] is None:
                cells[f"seed {seed}"] = f"{accuracy:.3f}, no goal"
            else:
                cells[f"seed {seed}"] = f"{'' if found['reached'] else '> '}{found['ratio']:.2f}, {accuracy:.3f}"
    return _table(rows)
