"""Write the pages of what the program knows, command line, configuration and metrics: `python -m docs.generate`.

`--check` writes nothing and fails, with the differences, where a page is not what would be written.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
from argparse import Action
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn
from unittest.mock import patch

from app.cli.commands import COMMANDS
from app.cli.dots import DotsCLI
from app.cli.parsing import DotsArgumentParser
from datamodules.metric_names import markdown_table

DOCS = Path(__file__).parent
NOTICE = "<!-- Written by `python -m docs.generate`: change the program's docstrings instead. -->\n"
STUDY_WIDTH = "100"
"""Columns of the help of the studies, which is shown as it is printed."""
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "The run": (
        "`model` and `data`, each with `class_path` and `init_args`.",
        (
            "app.module.GRPOModule",
            "app.engines.Sampling",
            "app.policy.adapters.Lora",
            "datamodules.online.OnlinePromptDataModule",
        ),
    ),
    "Prompt sources": (
        "`data.train`, `data.val` and `data.test`: one, or several by name. A set that is measured may be a "
        "`ValidationSet` around a source.",
        (
            "datamodules.prompts.PromptFile",
            "datamodules.prompts.Benchmark",
            "datamodules.procedural.Procedural",
            "datamodules.verifiers.VerifiersTasks",
            "datamodules.validation.ValidationSet",
        ),
    ),
    "Rewards": (
        "`model.rewards`, a list.",
        tuple(
            f"app.rewards.{name}"
            for name in (
                "Math", "Numeric", "Exact", "Code", "Judge", "Remote", "Function", "Format", "SoftOverlong",
                "ReasoningGym", "Environment",
            )
        ),
    ),
    "Environments": (
        "`model.environment`.",
        ("app.environments.Tools", "app.environments.Verifiers", "app.environments.OpenEnv"),
    ),
    "Selectors": (
        "`data.selector`.",
        tuple(
            f"datamodules.selectors.{name}"
            for name in (
                "Uniform", "Dots", "Greso", "Mopps", "Dps", "Pools", "Posterior", "Aligned", "Composed",
                "ZeroVarianceSkip",
            )
        ),
    ),
    "Callbacks": (
        "`trainer.callbacks`, a list. Those marked *standard* on [Callbacks](callbacks.md) need not be listed.",
        tuple(
            f"callbacks.{name}"
            for name in (
                "ReferenceRollouts", "RolloutReplay", "DynamicSampling", "Balanced", "Pilots", "RolloutAhead",
                "ShardedPolicy", "GenerationCost", "ClockBudget", "RunCheckpoint", "CompletionsLog", "SelectionMonitor",
                "StartValidation",
            )
        ),
    ),
    "Rollout engines": (
        "`model.engine`.",
        ("app.engines.Transformers", "app.engines.Vllm", "app.engines.VllmServer"),
    ),
}  # fmt: skip
"""Sections of the configuration page: what they set, and the classes that it may name."""


class _BuiltError(Exception):
    """Carries the command's parser out of `DotsCLI` before anything is parsed."""


class _Shown(DotsCLI):
    def parse_arguments(self, parser: DotsArgumentParser, args: object) -> NoReturn:
        raise _BuiltError(parser)


def command_parser() -> DotsArgumentParser:
    """Return the parser of the subcommands that go through LightningCLI."""
    try:
        with patch("sys.argv", ["dots"]):
            _Shown([])
    except _BuiltError as built:
        parser = built.args[0]
        assert isinstance(parser, DotsArgumentParser)
        return parser
    raise AssertionError("DotsCLI has parsed something")


def subcommands(parser: DotsArgumentParser) -> dict[str, DotsArgumentParser]:
    """Return the parsers of the subcommands by name."""
    choices = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return dict(choices)


@cache
def study_help(name: str) -> str:
    """Return what `dots NAME --help` prints."""
    out = io.StringIO()
    shown = patch.dict(os.environ, {"COLUMNS": STUDY_WIDTH, "NO_COLOR": "1"})
    with shown, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        COMMANDS[name].run(["--help"])
    return out.getvalue().strip()


def command_page(parser: DotsArgumentParser) -> str:
    """Return the page of the command line."""
    own = subcommands(parser)
    parts = [
        NOTICE,
        "# Command line\n",
        "`dots SUBCOMMAND --config FILE --option value`. Later configs and options override earlier ones; `+=` appends "
        "to a list. A new `class_path` drops the arguments of the class that it replaces. `--print_config` shows the "
        "result without running it, `--debug` shows the traceback of an error. What the options of `--model`, `--data` "
        "and `--trainer` mean stands on [Configuration](config.md).\n",
        "| subcommand | what it does |\n|---|---|",
        *(f"| [`dots {name}`](#dots-{name}) | {_summary(name, one)} |" for name, one in own.items()),
        *(f"| [`dots {name}`](#dots-{name}) | {_capital(one.summary)}. |" for name, one in COMMANDS.items()),
    ]
    shared = {key for name in own for key in _options(own[name])}
    shared = {key for key in shared if all(key in _options(one) for one in own.values())}
    for name, one in own.items():
        rows = [action for key, action in _options(one).items() if key not in shared]
        parts += [f"\n## dots {name}\n", _summary(name, one), "" if rows else "\nIt has no options of its own."]
        parts += [_table(rows)] if rows else []
    parts += ["\n## Options of all of these\n", _table([_options(own["fit"])[key] for key in sorted(shared)])]
    for name in COMMANDS:
        parts += [f"\n## dots {name}\n", f"```text\n{study_help(name)}\n```"]
    return "\n".join(parts) + "\n"


def config_page(parser: DotsArgumentParser) -> str:
    """Return the page of the configuration."""
    parts = [
        NOTICE,
        "# Configuration\n",
        "A config has the sections `seed_everything`, `trainer`, `model` and `data`, and a section for each standard "
        "callback with options (`checkpoint`, `completions`, `selection_monitor`, `start_validation`). `trainer` takes "
        "the arguments of [Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html), with "
        "these defaults of its own:\n",
        _table(
            [
                one
                for one in _all(subcommands(parser)["fit"])
                if re.fullmatch(
                    r"trainer\.(limit_\w+|val_check_interval|num_sanity_val_steps|log_every_n_steps)", one.dest
                )
            ]
        ),
    ]
    for title, (where, classes) in CLASSES.items():
        parts += [f"\n## {title}\n", where]
        for path in classes:
            of_class = parser.of_class(path)
            parts += [f"\n### {path.rpartition('.')[2]}\n", f"`{path}`: {_first_sentence(path)}\n"]
            rows = list(_all(of_class))
            parts += [_table(rows) if rows else "It has no options."]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return the generated pages by file name."""
    parser = command_parser()
    return {
        "cli.md": command_page(parser),
        "config.md": config_page(parser),
        "metrics.md": metrics_page((DOCS / "metrics.md").read_text()),
    }


def metrics_page(text: str) -> str:
    """Return the page of the metrics with the table of today, the text around it as it is."""
    start = text.index("| metric |")
    rest = text[start:].partition("\n\n")[2]
    return text[:start] + markdown_table() + (f"\n{rest}" if rest else "")


def _options(parser: DotsArgumentParser) -> dict[str, Action]:
    """Return the options of a subcommand that no class of the run has."""
    return {
        one.dest: one
        for one in _all(parser)
        if not re.match(r"(trainer|model|data|help|config|print_config)\b", one.dest)
    }


def _all(parser: DotsArgumentParser) -> Iterator[Action]:
    for one in parser._all_actions():
        is_group = type(one).__name__ in ("_ActionConfigLoad", "ActionFail", "_HelpAction", "_ActionHelpClassPath")
        if one.option_strings and not is_group and not one.dest.endswith(".help") and one.help != "==SUPPRESS==":
            yield one


def _summary(name: str, parser: DotsArgumentParser) -> str:
    texts = {
        "fit": "Train a policy.",
        "validate": "Measure a policy on the validation prompts.",
        "test": "Measure a policy on the test prompts.",
        "predict": "Generate completions of the test prompts and write them to a file.",
    }
    text = texts.get(name) or (parser.description or "").strip().partition("\n")[0]
    assert text, f"dots {name} has no description"
    return text


def _table(actions: list[Action]) -> str:
    with_meaning = any(_meaning(one) for one in actions)  # Lightning's parser does not pass on those of its trainer
    rows = ["| option | type | default |", "|---|---|---|"]
    rows = [row + end for row, end in zip(rows, (" meaning |", "---|"), strict=True)] if with_meaning else rows
    for one in actions:
        default = "**required**" if getattr(one, "required", False) else f"`{_plain(one.default)}`"
        rows.append(f"| `{one.dest}` | {_type(one)} | {default} |" + with_meaning * f" {_cell(_meaning(one))} |")
    return "\n".join(rows)


def _meaning(action: Action) -> str:
    return _capital(re.sub(r"\s*\((required, )?type: .*\)$", "", " ".join((action.help or "").split())))


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not value:
        return '""'
    return _cell(re.sub(r"\bNone\b", "null", str(getattr(value, "as_dict", lambda: value)())))


def _type(action: Action) -> str:
    hint = getattr(action, "_typehint", None) or action.type
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)
    if action.choices and not isinstance(action.choices, dict):
        text = ", ".join(map(str, action.choices))
    text = re.sub(r"\b(?:[a-z_0-9]+\.)+(?=[A-Za-z])", "", text)
    text = re.sub(r"Optional\[(.+)\]$", r"\1 or null", text)
    text = re.sub(r"Union\[(.+)\]$", lambda found: re.sub(r", (?![^\[]*\])", " or ", found[1]), text)
    text = re.sub(r"Literal\[(.+?)\]", r"\1", text).replace("NoneType", "null").replace(" | ", " or ")
    return _cell(text.replace("'", "").replace("ForwardRef", "").replace("None", "null"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _first_sentence(path: str) -> str:
    text = " ".join((resolve_name(path).__doc__ or "").strip().partition("\n\n")[0].split())
    return _cell(text)


def main() -> None:
    """Write the pages, or compare them with those that would be written."""
    if sys.argv[1:] != ["--check"]:
        for name, text in pages().items():
            (DOCS / name).write_text(text)
        return
    for name, text in pages().items():
        old = (DOCS / name).read_text().splitlines()
        difference = "\n".join(difflib.unified_diff(old, text.splitlines(), name, "as the program has it", lineterm=""))
        if difference:
            sys.exit(f"{difference}\n{name} is out of date: run `python -m docs.generate`")


if __name__ == "__main__":
    main()
