"""Arms, seeds and budget of a comparison."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.errors import UserError

SEED = "{seed}"
"""Placeholder for a run's seed in the name of a config file."""
_FILE = "request.json"


@dataclass(frozen=True, slots=True)
class Arm:
    """A method to compare: its name, and overlays over the base in whose names `{seed}` stands for a run's seed."""

    name: str
    configs: tuple[str, ...]

    def files(self, seed: int) -> tuple[str, ...]:
        """Return the overlays of one run."""
        return tuple(config.replace(SEED, str(seed)) for config in self.configs)


@dataclass(frozen=True, slots=True)
class Budget:
    """The rule that ends a run: "baseline", "seconds" or "steps" (see `dots compare --help`).

    `seconds` is the clock of the rule "seconds". A run under a clock takes at most `step_limit` times its
    `trainer.max_steps`.
    """

    rule: str
    seconds: float | None = None
    step_limit: float = 4.0

    @classmethod
    def parse(cls, given: str, step_limit: float) -> Budget:
        """Read the value of `--budget`. Raises UserError for an unknown rule or a number of seconds not above 0."""
        if given in ("baseline", "steps"):
            return cls(given, None, step_limit)
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UserError(
                f"--budget is {given}. Give baseline (the clock of the baseline's run), steps (trainer.max_steps) or a "
                "number of seconds above 0."
            )
        return cls("seconds", seconds, step_limit)

    def clocked(self, is_baseline: bool) -> bool:
        """Return whether the training clock ends a run."""
        return self.rule == "seconds" or (self.rule == "baseline" and not is_baseline)

    def __str__(self) -> str:
        if self.rule == "steps":
            return "trainer.max_steps"
        clock = "the length of the baseline's run" if self.seconds is None else f"{self.seconds:g} s"
        return f"a training clock of {clock}, at most {self.step_limit:g} times trainer.max_steps"


@dataclass(frozen=True, slots=True)
class Request:
    """A comparison: every arm runs once with each seed, over base configs that all arms share.

    Attributes:
        baseline: name of the arm that the others are measured against.
        evaluate_every: steps between evaluations; None keeps the base's `trainer.val_check_interval`.
        window: evaluations in the trailing mean that has to reach an accuracy.
    """

    base: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    budget: Budget
    evaluate_every: int | None
    window: int

    def runs(self) -> list[tuple[Arm, int]]:
        """Return all runs in the order in which they are trained.

        Runs are interleaved by seed, so that a machine that slows down does so for all arms alike, and the order of
        the arms rotates from seed to seed. A baseline whose clock is the others' budget always comes first.
        """
        first = [arm for arm in self.arms if self.budget.rule == "baseline" and arm.name == self.baseline]
        others = deque(arm for arm in self.arms if arm not in first)
        order = []
        for seed in self.seeds:
            order += [(arm, seed) for arm in (*first, *others)]
            others.rotate(-1)
        return order

    def save(self, folder: Path) -> None:
        """Write the request, so that `--report` can rebuild the report later."""
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Request:
        """Read a saved request. Raises UserError when there is none or it is unreadable."""
        try:
            saved = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            saved["arms"] = tuple(Arm(arm["name"], tuple(arm["configs"])) for arm in saved["arms"])
            saved["budget"] = Budget(**saved["budget"])
            return cls(**saved | {name: tuple(saved[name]) for name in ("base", "seeds")})
        except FileNotFoundError as error:
            raise UserError(
                f"--report {folder}: the folder has no {_FILE}. Give the --out folder of a `dots compare`."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--report {folder}: {_FILE} is unreadable ({error}). Run the comparison again to write it."
            ) from error
