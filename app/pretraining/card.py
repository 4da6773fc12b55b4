"""What is written beside the weights of a policy that was pretrained on demonstrations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.demonstrations.supervised import Demonstrations

GROUP = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """Validation at temperature 1.

    Attributes:
        accuracy: share of right completions.
        by_task: the same, by task.
        informative: expected share of groups of 8 with right and wrong completions, from each prompt's success rate.
        deciles: share of prompts by success rate: [0, 0.1), [0.1, 0.2), ... [0.9, 1].
        prompts: how many were measured.
    """

    accuracy: float
    by_task: dict[str, float]
    informative: float
    deciles: tuple[float, ...]
    prompts: int

    @classmethod
    def of(cls, successes: Mapping[str, np.ndarray]) -> Measured:
        """From arrays `[prompts, G]` of 0 and 1 by task; `G >= 8`."""
        rates = np.concatenate([success.mean(axis=1) for success in successes.values()])
        teach = [_informative(success) for success in successes.values()]
        counts, _ = np.histogram(rates, bins=10, range=(0.0, 1.0))
        return cls(
            accuracy=float(rates.mean()),
            by_task={task: float(success.mean()) for task, success in successes.items()},
            informative=float(np.concatenate(teach).mean()),
            deciles=tuple((counts / len(rates)).tolist()),
            prompts=len(rates),
        )


def _informative(success: np.ndarray) -> np.ndarray:
    """float `[prompts]`: share of the prompt's consecutive groups of 8 that are neither all right nor all wrong."""
    groups = success[:, : success.shape[1] // GROUP * GROUP].reshape(len(success), -1, GROUP).sum(axis=2)
    return ((groups > 0) & (groups < GROUP)).mean(axis=1)


def write_card(folder: Path, data: Demonstrations, measured: Measured, parameters: int, seconds: float) -> None:
    """`README.md` with Hugging Face front matter."""
    tasks = "\n".join(
        f"| `{task.name}` | `{json.dumps(task.params)}` | {task.size * data.repeats} | {data.noise[task.name]} |"
        for task in data.tasks
    )
    by_task = ", ".join(f"`{task}` {accuracy:.2f}" for task, accuracy in measured.by_task.items())
    deciles = " | ".join(f"{share:.2f}" for share in measured.deciles)
    text = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [dots, reasoning-gym, tiny]
---
# A tiny policy for `make quickstart`

A Qwen2 of {parameters / 1e6:.2f}M parameters that solves short [reasoning-gym](https://github.com/open-thought/reasoning-gym)
tasks step by step, and often wrongly: something for reinforcement learning to mend on two CPU cores. It knows nothing
else. The prompt is the question and a newline; the completion is the work, `#### `, the answer and `<eos>`. Tokens are
bytes (characters, where the text is ASCII), and one token for each fixed phrase of the questions.

## How it was made
`make tiny-policy` (`dots fit --config configs/tiny_policy.yaml`, {seconds:.0f} s on the CPU it was
made on): one pass of supervised training over generated worked solutions, cross-entropy on the completion. The first
{data.clean_fraction:.0%} are right; in the others each step is wrong with its task's probability, and the following
steps go on from the wrong value, so that a skill is learnt first and bad habits on top of it. Weights, text and data
come from this project and from reasoning-gym's generators; the demonstrations use none of the seeds that the
quickstart's pool can draw.

| task | settings | demonstrations | probability that a step is wrong |
|---|---|---|---|
{tasks}

## Measured
On {measured.prompts} prompts not seen in training, temperature 1: {measured.accuracy:.2f} of the completions are right
({by_task}); {measured.informative:.2f} of the groups of {GROUP} hold both right and wrong completions.
Share of prompts by success rate, in tenths from 0 to 1: {deciles}.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
