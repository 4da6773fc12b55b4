"""Recorded runs for `dots forecast`: RL runs of a small network and of the tiny policy, and made ones.

Each differs from the run that selectors were tuned on in how success rates move, and is the same in every process. With
`s` the level of a prompt's text and its own part, `t` the visit and `e` standard normal noise, log-odds of success are

- sudden: `clip(1.3 (t - w), -4.5, 4.5) + 0.3 e`, with `w` uniform in [-5, 60] less `3 s`: hardly ever right, then soon
  always, each prompt at a time of its own;
- late: `s - 2 + b max(0, t - V / 3)`, with `b` uniform in [0.05, 0.6]: a third of the run nothing moves, then most
  prompts are mastered;
- forgetting: `2.5 + e` with a chance of 0.06 per visit, else `s - 3` with 0.08, else as before with `0.2 e` more;
- restless: `s + 0.9 (x - s) + sqrt(0.19) 2.5 e`: half of what is known of a prompt is gone after seven visits;
- network: those of a network of one hidden layer that is trained by GRPO on the prompts (`_network`).

The policy's is the record of a real run: docs/results.md has its command.
`python -m tests.support.records FOLDER SEED` writes all of them as files for the command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from app.studies.forecast.recorded_run import QUESTION, RATES, Traces
from datamodules.difficulty.calibration import sigmoid

RECORDS = ("network", "sudden", "late", "forgetting", "restless")
POLICY = Path(__file__).parents[1] / "fixtures" / "tiny_policy_run.jsonl"
"""240 of the quickstart's prompts, 8 completions each, every 7 of 56 steps of plain GRPO on the others (seed 7)."""
SIZE, VISITS, GROUP = 400, 40, 8
_KINDS = ("apples", "trains", "squares", "coins", "clocks", "ladders", "prisms", "marbles")


def record(name: str, seed: int = 0, rates_of_learning: Sequence[float] = ()) -> tuple[Traces, np.ndarray]:
    """Return a recorded run of groups of 8 and the success rates of another model on its questions, float64 `[Q]`.

    `rates_of_learning` are the network's, by visit; 2 if not given.
    """
    rng = np.random.default_rng([RECORDS.index(name), seed])
    kind, length = rng.integers(len(_KINDS), size=SIZE), rng.integers(1, 9, size=SIZE)
    if name == "network":
        log_odds = _network(kind, length, rng, rates_of_learning or [2.0] * VISITS)
    else:
        log_odds = _made(name, kind, length, rng)
    rates = rng.binomial(GROUP, sigmoid(log_odds)) / GROUP
    middle = log_odds[:, VISITS // 2]
    other = rng.binomial(16, sigmoid(middle + 1.5 * rng.normal(size=SIZE))) / 16
    questions = tuple(
        f"{_KINDS[k]}: " + " + ".join(str(part) for part in rng.integers(1, 99, size=n))
        for k, n in zip(kind, length, strict=True)
    )
    return Traces(tuple(map(str, range(SIZE))), questions, rates), other


def write_record(path: Path, name: str, seed: int = 0) -> None:
    """Write a record as the JSONL file that `dots forecast --traces` reads, with the other model's rate as a column."""
    traces, other = record(name, seed)
    rows = zip(traces.questions, traces.rates.tolist(), other.tolist(), strict=True)
    lines = [json.dumps({QUESTION: text, RATES: rates, "pass_rate": rate}) for text, rates, rate in rows]
    path.write_text("\n".join(lines) + "\n")


def main(folder: str, seed: str = "0") -> None:
    """Write all records of a seed into a folder."""
    for name in RECORDS:
        write_record(Path(folder) / f"{name}.jsonl", name, int(seed))


def _made(name: str, kind: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return log-odds `[Q, V]` of worlds in which every prompt has a course of its own around its text's level."""
    level = 1.5 * rng.normal(size=len(_KINDS))[kind] - 0.8 * (length - 4.5) + 1.5 * rng.normal(size=SIZE) - 0.5
    visits = np.arange(VISITS)
    if name == "sudden":  # from hardly ever right to nearly always, within a few visits
        when = rng.uniform(-5, 60, size=SIZE) - 3 * np.clip(level, -4, 4)
        return np.clip(1.3 * (visits - when[:, None]), -4.5, 4.5) + 0.3 * rng.normal(size=(SIZE, 1))
    if name == "late":  # nothing moves in the first third, then most rise quickly and are mastered
        rise = np.clip(visits - VISITS / 3, 0, None) * rng.uniform(0.05, 0.6, size=(SIZE, 1))
        return level[:, None] - 2 + rise
    x, found = level, []
    for _ in visits:
        found.append(x)
        noise = rng.normal(size=SIZE)
        if name == "forgetting":  # learnt at once, and lost at once some ten visits later
            learnt, lost = rng.random(SIZE) < 0.06, rng.random(SIZE) < 0.08
            x = np.where(learnt, 2.5 + noise, np.where(lost, level - 3, x + 0.2 * noise))
        else:  # restless: half of what is known of a prompt is gone after seven visits
            x = level + 0.9 * (x - level) + np.sqrt(1 - 0.81) * 2.5 * noise
    return np.stack(found, axis=1)


def _network(
    kind: np.ndarray, length: np.ndarray, rng: np.random.Generator, rates_of_learning: Sequence[float]
) -> np.ndarray:
    """Return log-odds `[Q, V]` of a network of one hidden layer, trained by GRPO to answer a prompt's steps in turn.

    A step has four answers, one of them right by a random teacher, and a prompt is solved when all its steps are.
    """
    width, hidden, answers, steps = 12, 24, 4, int(length.max())
    base = rng.normal(size=(len(_KINDS), steps, width))[kind] + 0.7 * rng.normal(size=(SIZE, steps, width))
    teacher = rng.normal(size=(width, answers))
    right = (base @ teacher + 1.5 * rng.normal(size=(SIZE, steps, answers))).argmax(-1)
    used = np.arange(steps) < length[:, None]
    first, second = rng.normal(size=(width, hidden)) / np.sqrt(width), 0.1 * rng.normal(size=(hidden, answers))

    def chances(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        active = np.tanh(base[rows] @ first)
        logits = active @ second
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return active, weights / weights.sum(-1, keepdims=True)

    found = []
    for rate in rates_of_learning:
        chance = np.take_along_axis(chances(np.arange(SIZE))[1], right[..., None], 2)[..., 0]
        solved = np.clip(np.where(used, chance, 1.0).prod(1), 1e-6, 1 - 1e-6)
        found.append(np.log(solved / (1 - solved)))
        for _ in range(2):
            rows = rng.choice(SIZE, 48, replace=False)
            active, chance = chances(rows)
            drawn = (chance[None].cumsum(-1) < rng.random((GROUP, *chance.shape[:2], 1))).sum(-1)
            reward = np.where(used[rows], drawn == right[rows], True).all(-1).astype(float)
            advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-6)
            push = (np.eye(answers)[drawn] - chance) * (advantage[:, :, None] * used[rows])[..., None]
            push = push.mean(0) / len(rows)
            back = (push @ second.T) * (1 - active**2)
            second = second + rate * np.einsum("qsh,qsa->ha", active, push)
            first = first + rate * np.einsum("qsw,qsh->wh", base[rows], back)
    return np.stack(found, axis=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
