"""The account of a run in `summary.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.errors import UserError
from datamodules.ledger import PHASES

SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class RolloutCounts:
    """Number of rollouts of one kind."""

    prompts: int
    completions: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A validation, and the cost of the training before it.

    Attributes:
        step: number of steps.
        seconds: seconds of training (`TrainingClock`).
        completions: number of completions rolled out for training, reference sets included.
    """

    step: int
    seconds: float
    completions: int
    completion_tokens: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Content of `summary.json`.

    Attributes:
        prompts_rolled_out: number of prompts rolled out for training, without reference sets; `completions` and
            `completion_tokens` are theirs.
        replayed_groups: number of groups that came from the replay buffer.
        informative_fraction: fraction of informative groups in a batch, averaged over steps.
        discarded: training rollouts that a filter rejected.
        wasted: training rollouts that passed the filter but were neither needed nor kept.
        discarded_groups: number of groups that were discarded or wasted.
        failed_rewards: number of scores that timed out or crashed.
        val: "first", "best" and "last" validation accuracy; empty without validation.
        validation_prompts: fingerprint of the validation prompts, or None without any.
        training_seconds: seconds of training (`TrainingClock`).
        seconds: seconds by phase, and in total since the start of the run; 0 for a phase that the file does not have.
        rollout_overlapped_seconds: seconds of generation that ran during updates (`RolloutAhead`), and so were saved.
        config_sha256: hash of the run's config.yaml, or None if it has none.
        completed: whether the run ended as configured.
        unscored_completions: number of completions that were left out because no correctness reward applies to them;
            0 in a file of an earlier version, which did not count them.
        continued_tokens: tokens generated for completions that an earlier step had cut (`RolloutAhead`).
        reused_groups: groups in further updates on their batch (`model.reuse`), each counted in each of them.
        aged_out_groups: groups that no step trained on before they were too old (`RolloutAhead`).
        saved_completions: completions of groups that were dropped after their pilots (`Pilots`).
    """

    steps: int
    prompts_rolled_out: int
    completions: int
    completion_tokens: int
    replayed_groups: int
    informative_fraction: float
    reference: RolloutCounts
    validation: RolloutCounts
    discarded: RolloutCounts
    wasted: RolloutCounts
    discarded_groups: int
    failed_rewards: int
    val: Mapping[str, float]
    evaluations: tuple[Evaluation, ...]
    validation_prompts: str | None
    training_seconds: float
    seconds: Mapping[str, float]
    rollout_overlapped_seconds: float
    seed: int
    config_sha256: str | None
    completed: bool
    unscored_completions: int = 0
    continued_tokens: int = 0
    aged_out_groups: int = 0
    reused_groups: int = 0
    saved_completions: int = 0

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Read a `summary.json`.

        Raises:
            OSError: the file cannot be read.
            UserError: it is not the summary of a run of this version.
        """
        try:
            content = json.loads(path.read_text())
            for name in ("reference", "validation", "discarded", "wasted"):
                content[name] = RolloutCounts(**content[name])
            content["seconds"] = dict.fromkeys(PHASES, 0.0) | content["seconds"]
            content["evaluations"] = tuple(Evaluation(**one) for one in content["evaluations"])
            return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is not the summary of a run of this version ({str(error).splitlines()[0]}), expected one "
                "that `dots fit` wrote. Repeat the run or give another."
            ) from error

    def write(self, path: Path) -> None:
        """Write a `summary.json`, replacing an older one as a whole."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        os.replace(temporary, path)
