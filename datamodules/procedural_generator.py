"""Runs as a process of its own: reads tasks as JSON from standard input, writes their problems to standard output.

It imports nothing of the project: it is started by its path, with a fixed hash seed (see `procedural.generate`).
"""

from __future__ import annotations

import json
import pickle
import random
import sys
from dataclasses import fields
from typing import Any

import numpy as np


def main() -> None:
    """Answers with `problems`, or with `error` (and `given`, `valid` where a name is wrong)."""
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # a task that prints must not break the answer
    output.write(pickle.dumps(answer(json.load(sys.stdin))))


def answer(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS, create_dataset

    for task in tasks:
        if task["name"] not in DATASETS:
            return {"error": f"no task {task['name']!r}", "given": task["name"], "valid": sorted(DATASETS)}
        known = {setting.name for setting in fields(DATASETS[task["name"]][1])} - {"seed", "size"}
        for unknown in sorted(set(task["params"]) - known):
            return {
                "error": f"task {task['name']!r} has no setting {unknown!r}",
                "given": unknown,
                "valid": sorted(known),
            }
    problems = []
    for task in tasks:
        try:
            generator = create_dataset(task["name"], seed=task["seed"], size=task["size"], **task["params"])
        except (AssertionError, TypeError, ValueError) as error:
            return {"error": f"task {task['name']!r} refuses {task['params']}: {error}"}
        problems.append([_problem(generator, task["seed"], index) for index in range(task["size"])])
    return {"problems": problems}


def _problem(generator: Any, seed: int, index: int) -> dict[str, Any]:
    """One problem; the global generators are set as well, for the tasks that draw from them."""
    random.seed(seed + index)
    np.random.seed((seed + index) % 2**32)
    return generator[index]


if __name__ == "__main__":
    main()
