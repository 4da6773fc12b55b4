"""One cell of the study: a walk with one learning rate and seed, and what its groups are worth at its end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.objective.statistics import Statistics
from app.studies.worth.measure import Gradients, GroupGradient, HeldOut, stepped, sum_of
from app.studies.worth.walk import Walk, Walker
from callbacks.algorithm.replay_worth import agreement
from datamodules.errors import UserError
from datamodules.ledger import Ledger
from datamodules.seeding import generator
from datamodules.types import Prompt

Cell = dict[str, Any]
"""Plain values, as `cells/*.json` holds them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; the options of `dots worth`."""

    ages: tuple[int, ...]
    uses: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    groups: int
    draws: int
    prompts: int
    held_out: int
    sampled: bool

    def cells(self) -> list[tuple[float, int, int]]:
        """Return learning rate, uses and seed of every walk. Groups never used are rolled out beside those used once.

        Seed by seed, so that a study that is stopped has measured all of it with its first seeds.
        """
        walks = sorted({max(1, use) for use in self.uses})
        return [
            (rate, uses, seed) for seed, rate, uses in itertools.product(self.seeds, self.learning_rates, walks)
        ]  # fmt: skip

    def rows(self, walk: int) -> list[tuple[int, int]]:
        """Return uses and age of what is measured after the walk of so many uses."""
        uses = [one for one in self.uses if max(1, one) == walk]
        # A group has been trained on in its own step and then once in every following one.
        return [(use, age) for use in uses for age in self.ages if age >= use]


def measure(walker: Walker, plan: Plan, rate: float, uses: int, seed: int) -> Cell:
    """Walk from the checkpoint, and measure the groups of every age at the end."""
    walker.restart(rate, seed)
    rows = plan.rows(uses)
    steps = max(plan.ages)
    unused = [steps - age for use, age in rows if use == 0]
    walk = walker.walk(steps, uses - 1, unused)
    here = walker.weights()
    fresh = [one for one in walker.roll(walker.next_prompts(plan.prompts), steps, Ledger()) if one.informative]
    sets = {
        (use, age): [
            one
            for one in (walk.spare[steps - age] if use == 0 else walk.born[steps - age])
            if one.informative and one.prompt.id not in {other.prompt.id for other in fresh}
        ]
        for use, age in rows
    }
    most = max((len(groups) for groups in sets.values()), default=0)
    if len(fresh) < plan.groups + most:
        raise UserError(
            f"--prompts is {plan.prompts}, of which {len(fresh)} had an informative group (learning rate {rate:g}, "
            f"seed {seed}), but --groups {plan.groups} and the {most} added to them need {plan.groups + most}. Raise "
            "--prompts or lower --groups."
        )
    gradients = Gradients(walker)
    of_fresh = [gradients.of(one, steps) for one in fresh]
    questions = _held_out(walker, plan.held_out)
    on_held_out = walker.roll(questions, 0, Ledger(), "validate")
    held_out = HeldOut(walker, on_held_out)
    # Groups of the same policy: with them, the agreement of gradients is over more pairs.
    on_policy = [*of_fresh, *(gradients.of(one, steps) for one in on_held_out if one.informative)]
    take = _Steps(walker, here, gradients, rate, held_out, questions if plan.sampled else [])
    found = {key: [gradients.of(one, steps) for one in groups] for key, groups in sets.items() if groups}
    everyone = [*on_policy, *(one for its in found.values() for one in its)]
    size = float(np.mean([gradients.size(one) for one in (*fresh, *(one for its in sets.values() for one in its))]))
    root = gradients.scale(torch.stack([one.flat.square() for one in everyone]).mean(0) / size**2).sqrt()

    def numbers(one: GroupGradient) -> np.ndarray:
        """Return a gradient whose inner products are those that AdamW's step sees."""
        return np.asarray((one.flat * root).cpu().numpy())

    measured: list[dict[str, Any]] = []
    for (use, age), its in found.items():
        seen = Statistics.empty(walker.module.device)
        for one in its:
            seen = seen.merge(one.seen)
        told = seen.metrics()
        row: dict[str, Any] = {"uses": use, "age": age, "groups": len(its), "gains": []}
        row["drift"] = told.get("sampling/sampling_logp_difference/mean", 0.0)
        row["effective"] = told.get("sampling/effective_sample_fraction", 1.0)
        row["adam"] = agreement(*(np.stack([numbers(one) for one in some]) for some in (its, on_policy)))
        row["sketch"] = agreement(*(np.stack([one.sketch.cpu().numpy() for one in some]) for some in (its, on_policy)))
        measured.append(row)
    for draw in range(plan.draws):
        order = generator(seed, "worth", "draw", draw).permutation(len(fresh))
        base = order[: plan.groups]
        size = sum(gradients.size(fresh[one]) for one in base)
        first = sum_of([of_fresh[one] for one in base]) / size
        alone = take.gain(first, first)
        more: dict[int, list[float]] = {}  # by the number of groups that are added
        for row, its in zip(measured, found.values(), strict=True):
            if (count := len(its)) not in more:
                added = sum_of([of_fresh[one] for one in order[plan.groups : plan.groups + count]]) / size
                more[count] = take.gain(first + added, first)
            replayed = take.gain(first + sum_of(its) / size, first)
            row["gains"].append({"fresh": alone, "with_replayed": replayed, "with_fresh": more[count]})
        take.questions = []  # new completions are for the first draw alone
    return {
        "learning_rate": rate, "uses": uses, "seed": seed, "success": held_out.success, "rows": measured,
        "cost": _cost(walk),
    }  # fmt: skip


class _Steps:
    """Takes one step at a time from the same policy and tells its gain.

    The step is AdamW's with the second moments of the walk's end, for a gradient that has its whole effect at once: its
    momentum spreads the same effect over about ten steps. A group has the same weight in each of the compared steps,
    that of the batch of fresh groups alone, and so has the clipping: groups that are added add to the step, where under
    a mean over more of them it would be equally long, and what is added would show in its noise only.
    """

    def __init__(
        self, walker: Walker, start: list[Tensor], gradients: Gradients, rate: float, held_out: HeldOut,
        questions: Sequence[Prompt],
    ) -> None:  # fmt: skip
        self._walker, self._start, self._gradients, self._rate = walker, start, gradients, rate
        self._held_out, self.questions = held_out, questions

    def gain(self, gradient: Tensor, first: Tensor) -> list[float]:
        """Return the estimated gain in held-out success and, with `questions`, that of new completions of these."""
        limit, norm = self._walker.module.optimization.clip_norm, float(first.norm())
        clip = min(1.0, limit / norm) if limit and norm else 1.0
        stepped(
            self._walker, self._start, self._rate * clip * gradient * self._gradients.scale((clip * gradient).square())
        )
        found = [self._held_out.gain()]
        if self.questions:
            groups = self._walker.roll(self.questions, 0, Ledger(), "validate")
            success = np.mean([one.success_rate for one in groups if len(one.completions) > 1])
            found.append(float(success) - self._held_out.success)
        self._walker.load(self._start)
        return found


def _held_out(walker: Walker, count: int) -> list[Prompt]:
    names = walker.data.measured("val")
    prompts = [prompt for name in names for prompt in walker.data.pools[name]]
    order = generator(0, "worth", "held out").permutation(len(prompts))
    return [prompts[int(position)] for position in order[:count]]


def _cost(walk: Walk) -> dict[str, float]:
    """Return what decides whether replay pays, as measured in a walk: sums over its steps."""
    seconds, counts = walk.ledger.seconds, walk.ledger.counts
    return {
        "rollout_seconds": seconds["rollout"] + seconds["reward"], "update_seconds": seconds["update"],
        "tokens": counts["train/tokens"], "fresh": walk.fresh, "informative": walk.informative,
        "updated": walk.updated,
    }  # fmt: skip
