"""What a comparison was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import UserError

SEED = "{seed}"
"""Stands for a run's seed in the name of a config file."""
FILE = "request.json"


@dataclass(frozen=True, slots=True)
class Arm:
    """A method.

    Attributes:
        name: in the report and in the names of folders.
        configs: overlays over the base, in order; `{seed}` in a name stands for the seed of the run.
    """

    name: str
    configs: tuple[str, ...]

    def files(self, seed: int) -> list[str]:
        """The overlays of one run."""
        return [config.replace(SEED, str(seed)) for config in self.configs]


@dataclass(frozen=True, slots=True)
class Budget:
    """When an arm's run ends.

    Attributes:
        rule: "baseline": the baseline runs its `trainer.max_steps`, every other arm until its training clock passes
            that of the baseline's run with the same seed; "seconds": all until their clock passes so many; "steps": all
            run their `trainer.max_steps`.
        seconds: of the rule "seconds".
        step_limit: under a clock no run takes more than so many times its `trainer.max_steps`.
    """

    rule: str
    seconds: float | None = None
    step_limit: float = 4.0

    @classmethod
    def parse(cls, given: str, step_limit: float) -> Budget:
        """From the option's value. Raises UserError for what is none."""
        if given in ("baseline", "steps"):
            return cls(given, None, step_limit)
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UserError(
                f"--budget {given}: expected baseline (the clock of the baseline's run), steps (trainer.max_steps) or "
                "a number of seconds above 0"
            )
        return cls("seconds", seconds, step_limit)

    def clocked(self, is_baseline: bool) -> bool:
        """Whether a run ends by its clock."""
        return self.rule == "seconds" or (self.rule == "baseline" and not is_baseline)

    def __str__(self) -> str:
        if self.rule == "steps":
            return "trainer.max_steps"
        clock = "the length of the baseline's run" if self.seconds is None else f"{self.seconds:g} s"
        return f"a training clock of {clock}, at most {self.step_limit:g} times trainer.max_steps"


@dataclass(frozen=True, slots=True)
class Request:
    """A comparison.

    Attributes:
        base: configs of the setting that all arms share, in order.
        arms: the methods, in the order of the report.
        seeds: of the runs of every arm.
        baseline: name of the arm that the others are set against.
        budget: when runs end.
        evaluate_every: steps between two evaluations; None leaves the base's `trainer.val_check_interval`.
        window: evaluations in the trailing mean by which accuracy is said to be reached.
    """

    base: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    budget: Budget
    evaluate_every: int | None
    window: int

    def runs(self) -> list[tuple[Arm, int]]:
        """All runs in the order in which they are made.

        Seed by seed, so that a machine that grows slower does so for all arms alike; from seed to seed the arms change
        places. A baseline whose clock is the others' budget keeps the first one.
        """
        first = [arm for arm in self.arms if self.budget.rule == "baseline" and arm.name == self.baseline]
        others = [arm for arm in self.arms if arm not in first]
        return [(arm, seed) for turn, seed in enumerate(self.seeds) for arm in (*first, *_rotated(others, turn))]

    def save(self, folder: Path) -> None:
        """Writes it, for a report that is made later."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Request:
        """Reads it back. Raises UserError where none was saved."""
        try:
            saved: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(
                base=tuple(saved["base"]),
                arms=tuple(Arm(arm["name"], tuple(arm["configs"])) for arm in saved["arms"]),
                seeds=tuple(saved["seeds"]),
                baseline=saved["baseline"],
                budget=Budget(**saved["budget"]),
                evaluate_every=saved["evaluate_every"],
                window=saved["window"],
            )
        except FileNotFoundError as error:
            raise UserError(f"--report {folder}: no {FILE} there; expected the --out of a `dots compare`") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--report {folder}: its {FILE} cannot be read ({error}); run the comparison again"
            ) from error


def run_folder_of(out: Path, arm: str, seed: int) -> Path:
    """Where a run stands below the folder of its comparison."""
    return out / "runs" / arm / f"seed_{seed}"


def _rotated(arms: list[Arm], turn: int) -> Iterator[Arm]:
    for place in range(len(arms)):
        yield arms[(place + turn) % len(arms)]
