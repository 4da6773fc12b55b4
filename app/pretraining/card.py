"""Model card of a policy pretrained on demonstrations."""

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
    """Validation results at temperature 1: fraction of correct completions, also by task, and number of prompts.

    `informative` is the expected fraction of groups of 8 with both correct and wrong completions, `deciles` the
    fraction of prompts by success rate: [0, 0.1), [0.1, 0.2), ... [0.9, 1].
    """

    accuracy: float
    by_task: dict[str, float]
    informative: float
    deciles: tuple[float, ...]
    prompts: int

    @classmethod
    def of(cls, successes: Mapping[str, np.ndarray]) -> Measured:
        """Compute the results from arrays `[prompts, G]` of 0 and 1 by task; `G >= 8`."""
        rates = np.concatenate([success.mean(axis=1) for success in successes.values()])
        counts, _ = np.histogram(rates, bins=10, range=(0.0, 1.0))
        informative = []
        for success in successes.values():
            groups = success[:, : success.shape[1] // GROUP * GROUP].reshape(len(success), -1, GROUP).sum(axis=2)
            informative.append(((groups > 0) & (groups < GROUP)).mean(axis=1))
        return cls(
            accuracy=float(rates.mean()),
            by_task={task: float(success.mean()) for task, success in successes.items()},
            informative=float(np.concatenate(informative).mean()),
            deciles=tuple((counts / len(rates)).tolist()),
            prompts=len(rates),
        )


def write_card(folder: Path, data: Demonstrations, measured: Measured, parameters: int, seconds: float) -> None:
    """Write `README.md` with Hugging Face front matter."""
    tasks = "\n".join(
        f"| `{task.name}` | `{json.dumps(task.params)}` | {task.size * data.repeats} | {data.noise[task.name]} |"
        for task in data.tasks
    )
    by_task = ", ".join(f"`{task}` {accuracy:.2f}" for task, accuracy in measured.by_task.items())
    deciles = " | ".join(f"{share:.2f}" for share in measured.deciles)
    if data.calls:
        run, pretraining, config = "calculator", "calculator-policy", "calculator_policy"
        how = "with a calculator, carelessly and often without it,"
        completion = (
            f"The completion is one call after\nthe other, such as `{data.calls.start}37*48{data.calls.end}`, each "
            "with the calculator's reply, then `#### `, the answer and `<eos>`."
        )
        loss = "what the policy says"
        habit = (
            f" A wrong step is a wrong\nresult without a call ({data.calls.unaided:.0%}), or a call with a wrong digit."
        )
    else:
        run, pretraining, config = "quickstart", "tiny-policy", "tiny_policy"
        how = "step by step, often wrongly,"
        completion = "The completion is the work, `#### `, the answer and `<eos>`."
        loss = "the completion"
        habit = ""
    text = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [dots, reasoning-gym, tiny]
---
# A tiny policy for `make {run}`

A Qwen2 with {parameters / 1e6:.2f}M parameters that solves short [reasoning-gym](https://github.com/open-thought/reasoning-gym)
tasks {how} so that reinforcement learning has something to improve on two CPU cores. It can do
nothing else. The prompt is the question and a newline. {completion}
Each byte is a token, and so is each fixed phrase of the questions.

## Training
`make {pretraining}` (`dots fit --config configs/{config}.yaml`, {seconds:.0f} s on a CPU): one epoch of supervised
training on generated worked solutions, with cross-entropy on {loss}. The first {data.clean_fraction:.0%} of the
solutions are correct. In the others each step is wrong with the probability of its task, and the following steps
continue from the wrong value: the policy learns the skill first and then bad habits.{habit}
Weights, text and data come from this project and from reasoning-gym's generators. The demonstrations use no seed that
the pool of `make {run}` can draw.

| task | settings | demonstrations | probability that a step is wrong |
|---|---|---|---|
{tasks}

## Results
On {measured.prompts} unseen prompts at temperature 1, {measured.accuracy:.2f} of the completions are correct
({by_task}), and {measured.informative:.2f} of the groups of {GROUP} contain both correct and wrong completions.
Fraction of prompts by success rate, in tenths from 0 to 1: {deciles}.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
