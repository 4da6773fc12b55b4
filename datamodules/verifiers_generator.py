"""Program that reads a taskset's name and arguments as JSON from standard input, and writes its tasks as JSON.

It imports nothing of the project: `verifiers.read_tasks` starts it by its path, because loading a taskset runs its
author's code, which does not belong in the trainer's process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def first_messages(data: Any, speaks_first: bool = False) -> list[dict[str, Any]]:
    """Return the messages with which a conversation about a task begins, given its `TaskData`.

    Where the environment speaks first, as it does without a prompt, the user's message is empty, to which it adds.
    """
    from verifiers.v1.dialects.chat import message_to_wire

    prompt = "" if speaks_first else data.prompt or ""
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(message_to_wire, prompt)
    return [*([] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]), *said]


def rows(
    taskset: str, arguments: dict[str, Any], limit: int | None, speaks_first: bool = False
) -> list[dict[str, Any]]:
    """Return the rows of a taskset: `id`, `prompt`, and as JSON the whole `task` and the prompt, as `begins`."""
    import verifiers.v1 as vf

    config = vf.taskset_config_type(taskset).model_validate({**arguments, "id": taskset})
    tasks = vf.load_taskset(config)
    if limit is not None:
        tasks = tasks.take(limit)
    elif not tasks.bounded:
        raise ValueError("it never ends. Set limit")
    found = []
    for task in tasks:
        prompt = first_messages(task.data, speaks_first)
        name = task.data.id or task.data.name or str(task.data.idx)
        found.append({"id": name, "prompt": prompt, "task": task.data.model_dump_json(), "begins": json.dumps(prompt)})
    return found


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr  # keeps what a taskset prints out of the reply
    sys.path.append(os.getcwd())  # where users keep their tasksets, after all that is installed
    try:
        reply: dict[str, Any] = {"rows": rows(**json.load(sys.stdin))}
    except Exception as error:  # noqa: BLE001 (the taskset's code may raise anything)
        reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    json.dump(reply, output)
