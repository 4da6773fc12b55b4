"""Program that reads reasoning-gym tasks as JSON from standard input and writes their problems to standard output.

It imports nothing of the project: `procedural.generate` starts it by its path, with a fixed hash seed.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
from dataclasses import fields
from typing import TypedDict

import numpy as np


class Task(TypedDict):
    name: str
    size: int
    params: dict[str, object]
    seed: int


def answer(tasks: list[Task]) -> dict[str, object]:
    """Return `problems`, or `error` with, for a wrong name, the `given` and the `valid` ones."""
    from reasoning_gym.factory import DATASETS, create_dataset

    for task in tasks:
        if task["name"] not in DATASETS:
            return {"error": f"has no task {task['name']!r}", "given": task["name"], "valid": sorted(DATASETS)}
        known = {setting.name for setting in fields(DATASETS[task["name"]][1])} - {"seed", "size"}
        for unknown in sorted(set(task["params"]) - known):
            error = f"task {task['name']!r} has no setting {unknown!r}"
            return {"error": error, "given": unknown, "valid": sorted(known)}
    problems: list[list[object]] = []
    for task in tasks:
        try:
            dataset = create_dataset(task["name"], seed=task["seed"], size=task["size"], **task["params"])
        except (AssertionError, TypeError, ValueError) as error:
            return {"error": f"task {task['name']!r} rejects {task['params']} ({error})"}
        problems.append([])
        for index in range(task["size"]):  # some tasks draw from the global generators
            random.seed(task["seed"] + index)
            np.random.seed((task["seed"] + index) % 2**32)
            problems[-1].append(dataset[index])
    return {"problems": problems}


if __name__ == "__main__":
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # keeps what a task prints out of the reply
    output.write(pickle.dumps(answer(json.load(sys.stdin))))
