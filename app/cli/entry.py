"""The command's first look at its arguments. What can be answered without loading torch is answered at once."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import version
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NoReturn

from app.cli.commands import ALIASES, COMMANDS, LIGHTNING_COMMANDS, overview
from datamodules.errors import nearest

_OF_A_CHECKPOINT = ("validate", "test", "predict", "export", "select")
"""Subcommands that a run folder gives its checkpoint to, besides its config."""
_MEASURING = ("validate", "test", "predict")
"""Subcommands that may be given several runs, checkpoints or policies, which are measured one after the other."""
OF_BENCHMARKS = ("test", "predict")
"""Subcommands that take `--benchmarks`, and a policy in the place of a run."""
WHOLE_ANSWERS = "--whole_answers"
"""Told to `DotsCLI` of a policy without a run: the length of its completions was not chosen by anyone."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def main(args: list[str] | None = None) -> None:
    """Run `dots`; `args` default to the process's own."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] in (["--help"], ["-h"], ["help"]):
        print(overview())
    elif given[:1] == ["--version"]:
        print(f"dots {version('dots-grpo')}")
    else:
        commands = [expand(one) for one in _each(given)]
        from app.cli.dots import main as run
        from app.cli.dots import measure_each

        if len(commands) == 1:
            run(commands[0])
        else:
            measure_each(commands)


def expand(given: list[str]) -> list[str]:
    """Return the arguments with aliases, `COMMAND RUN`, `--resume` and `--benchmarks` written out.

    Exits if there is no command.
    """
    if not given:
        _refuse("no command is given. dots --help lists them.")
    name, rest = ALIASES.get(given[0], given[0]), given[1:]
    names = [*LIGHTNING_COMMANDS, *COMMANDS, *ALIASES.values()]
    if not name.startswith("-") and name not in names:
        hint = nearest(name, [*LIGHTNING_COMMANDS, *COMMANDS, *ALIASES])
        _refuse(f"subcommand {name!r} does not exist. {hint[:1].upper()}{hint[1:]} (dots --help lists all)")
    if name == "fit":
        return [name, *_resumed(rest)]
    if name in OF_BENCHMARKS:
        rest = _measured(name, rest)
    if name not in COMMANDS and rest and not rest[0].startswith("-"):
        run = rest[0]
        return [name, *_of_run(run, run if name in _OF_A_CHECKPOINT else None), *rest[1:]]
    if name in _OF_A_CHECKPOINT and not any(re.match(r"(-c|--config|--model)\b", one) for one in rest):
        named = [after for one, after in pairwise([*rest, ""]) if one == "--ckpt_path"]
        named += [one.partition("=")[2] for one in rest if one.startswith("--ckpt_path=")]
        if named and named[0] != "last":
            return [name, *_of_run(named[0], None), *rest]
    return [name, *rest]


def _each(given: list[str]) -> list[list[str]]:
    """Return one command for each of the runs, checkpoints or policies that `dots predict A B ...` names.

    Links to the same checkpoint, such as `last.ckpt` in `checkpoints/*.ckpt`, count once.
    """
    if not given or ALIASES.get(given[0], given[0]) not in _MEASURING:
        return [given]
    named = list(takewhile(lambda one: not one.startswith("-"), given[1:]))
    distinct: dict[str, str] = {}
    for one in sorted(named, key=os.path.islink):
        distinct.setdefault(os.path.realpath(one), one)
    kept = [one for one in dict.fromkeys(named) if one in distinct.values()]
    return [[given[0], one, *given[1 + len(named) :]] for one in kept] if len(kept) > 1 else [given]


def _resumed(rest: list[str]) -> list[str]:
    for place, token in enumerate(rest):
        option, equals, run = token.partition("=")
        if option == "--resume":
            end = place + (1 if equals else 2)
            if not equals and end > len(rest):
                _refuse("--resume is given no run folder. Write e.g. --resume runs/my_run/version_0.")
            return [*_of_run(run if equals else rest[place + 1], "last"), *rest[:place], *rest[end:]]
    return rest


def _measured(name: str, rest: list[str]) -> list[str]:
    """Return the arguments with `--benchmarks` and a policy in the place of a run written out.

    They come after all configs, whose prompts and rewards they replace, and before the other options, which may change
    them.
    """
    run = rest[:1] if rest and not rest[0].startswith("-") else []
    configs: list[str] = []
    others: list[str] = []
    asked: list[str] = []
    following = iter(rest[len(run) :])
    for token in following:
        option, equals, value = token.partition("=")
        if option in ("-c", "--config", "--benchmarks"):
            if not equals and (value := next(following, "")) == "":
                _refuse(f"{option} is given nothing. Write e.g. --benchmarks gsm8k,math500 or --config run.yaml.")
            asked += [one.strip() for one in value.split(",")] if option == "--benchmarks" else []
            configs += [] if option == "--benchmarks" else ["--config", value]
        else:
            others.append(token)
    has_prompts = bool(asked) or any(token.startswith("--data.test") for token in others)
    is_policy = run and (
        (not Path(run[0], "config.yaml").is_file() and Path(run[0], "config.json").is_file())
        or (has_prompts and not os.path.exists(run[0]) and _HUB_NAME.fullmatch(run[0]))
    )  # fmt: skip
    if is_policy and not has_prompts and not configs:
        _refuse(
            f"{run[0]} is a policy, and no prompts are given. Name benchmarks as in --benchmarks gsm8k,math500, or a "
            "file as in --data.test.mine.path my.jsonl."
        )
    if not asked and not is_policy:
        return rest
    added = ["--model.rewards=math"] if asked or not configs else []
    if is_policy:
        added.append(f"--model.policy.path={run.pop()}")
        if not configs:
            # Of a set in `data.test` it is said beside this one.
            if not any("max_completion_length" in token and not token.startswith("--data") for token in others):
                added.append(WHOLE_ANSWERS)
            # What benchmarks are asked as; it is not read.
            added.append(f"--data.train={json.dumps(_benchmark('gsm8k'))}")
    if asked:
        added.append(f"--data.test={json.dumps({one: _benchmark(one) for one in asked})}")
    return [*run, *configs, *added, *others]


def _benchmark(name: str) -> dict[str, object]:
    return {"class_path": "datamodules.prompts.Benchmark", "init_args": {"benchmark": name}}


def _of_run(run: str, checkpoint: str | None) -> list[str]:
    """Return the options that name the config of a run, given by its folder or one of its checkpoints."""
    config = Path(run, "config.yaml")
    if not config.is_file() and Path(run).parent.name == "checkpoints":
        config = Path(run).parent.parent / "config.yaml"
    if not config.is_file():
        if run.endswith((".yaml", ".yml")):
            _refuse(f"{run} is no run folder, which this place is for. Write --config {run}.")
        there = "there is no config.yaml in it" if os.path.isdir(run) else "there is no such folder"
        _refuse(
            f"{run} is not a run folder: {there}. Give the folder of a run, e.g. runs/my_run/version_0, or a "
            "checkpoint in it."
        )
    return ["--config", str(config), *(() if checkpoint is None else ("--ckpt_path", checkpoint))]


def _refuse(message: str) -> NoReturn:
    print(f"dots: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
