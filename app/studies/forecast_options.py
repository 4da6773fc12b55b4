"""The options of `dots forecast`, and the selectors that they name."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser, short_names
from datamodules.errors import UserError, nearest
from datamodules.selectors import Selector

DESCRIPTION = (
    "Compares selectors on a recorded run: each chooses prompts visit by visit, sees only what it chose, and is scored "
    "on all. For example: dots forecast --traces rates.jsonl --selector Uniform --selector Mopps --selector Dots "
    "--selector.alpha 0.4 --encoder FOLDER --out study"
)


def forecast_parser() -> DotsArgumentParser:
    """The parser of `dots forecast`."""
    parser = command_parser("forecast", DESCRIPTION)
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options; may be given several times")
    add("--traces", type=str, required=True, help='JSONL of {"question", "pass_rate_by_epoch": [rate, ...]}')
    add(
        "--selector",
        type=list[Selector],
        default=[],
        help="class name or dotted path; may be repeated, and --selector.OPTION VALUE is an option of the latest. "
        "Its row bears the class's name, followed by its options where two are of one class",
    )
    add(
        "--selectors",
        type=dict[str, Selector],
        default={},
        help="mapping of row labels to {class_path, init_args}, mostly for --config; --selectors.LABEL NAME adds one",
    )
    add("--batch", type=int, default=128, help="prompts chosen at every visit, B")
    add("--seeds", type=int, default=5, help="runs of every selector, with seeds 0, 1, ...")
    add("--out", type=str, required=True, help="folder of forecast.json, forecast.csv, forecast.png and config.yaml")
    add("--references", type=int, default=256, help="reference prompts of selectors that use them, K; 0 for none")
    add("--every", type=int, default=2, help="visits between two reference sets")
    add("--resample", type=bool, default=False, help="show a binomial draw of --samples instead of the recorded rate")
    add("--samples", type=int, default=8, help="completions behind a rate, G")
    add("--shuffle", type=bool, default=False, help="put the questions into another order")
    add("--from", type=int, default=0, help="first visit replayed, counted from 0 (22 of 44: the second half)")
    add("--visits", type=int | None, default=None, help="visits replayed; null for all that every trace has")
    add("--encoder", type=str | None, default=None, help="text encoder of selectors that embed and name none")
    add("--cache_dir", type=str, default="~/.cache/dots", help="where embeddings are kept")
    return parser


def read_options(parser: DotsArgumentParser, args: list[str]) -> Namespace:
    """Parses the command line. Raises UserError, or exits with one line, for options that cannot be used."""
    options = parser.parse_args(list(_spelled_out(args)))
    if not options.selector and not options.selectors:
        raise UserError(f"no selector was given: add e.g. --selector {' or '.join(sorted(short_names(Selector))[:3])}")
    for name, least in (("batch", 1), ("seeds", 1), ("every", 1), ("samples", 1), ("references", 0), ("from", 0)):
        if options[name] < least:
            raise UserError(f"--{name} is {options[name]}, expected a number of at least {least}")
    if options.references == 1:
        raise UserError("--references is 1, expected 0 (none) or at least 2")
    return options


def labels(options: Namespace) -> dict[str, tuple[str, str | int]]:
    """Row labels, and where the selector of each stands: ("selectors", label) or ("selector", position)."""
    found: dict[str, tuple[str, str | int]] = {name: ("selectors", name) for name in options.selectors}
    names = [_short(spec.class_path) for spec in options.selector]
    for position, (name, spec) in enumerate(zip(names, options.selector, strict=True)):
        taken = Counter(names)[name] > 1 or name in options.selectors
        label = f"{name}({_settings(spec)})" if taken and _settings(spec) else name
        if label in found:
            raise UserError(f"two selectors are both {label!r}: give them different options, or labels in --selectors")
        found[label] = ("selector", position)
    return found


def _spelled_out(args: list[str]) -> Iterator[str]:
    """The command line with every `--selector NAME` appending to the list instead of replacing it."""
    tokens = iter(args)
    for token in tokens:
        option, equals, value = token.partition("=")
        if option == "--selector":
            yield "--selector+=" + _appended(value if equals else next(tokens, ""))
        elif option.startswith("--init_args."):
            yield f"--selector.{token[2:]}"
        else:
            yield token


def _appended(given: str) -> str:
    """A selector given by its name as the parser's mapping; dotted paths and mappings are the parser's business.

    Raises UserError for a name that is no selector.
    """
    known = short_names(Selector)
    if not given or given.startswith("-"):
        raise UserError(f"--selector has no name behind it: {nearest(given, known)}")
    if not given.isidentifier():
        return given
    if given not in known:
        raise UserError(f"--selector {given}: no such selector, {nearest(given, known)}")
    return json.dumps({"class_path": f"{known[given].__module__}.{given}"})


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _settings(spec: Namespace) -> str:
    """`name=value` of the options that differ from their defaults."""
    defaults = inspect.signature(resolve_name(spec.class_path)).parameters
    given = vars(spec.get("init_args") or Namespace())
    changed = {name: value for name, value in given.items() if value != defaults[name].default}
    return ", ".join(f"{name}={_shown(value)}" for name, value in changed.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Namespace) and "class_path" in value:
        settings = _settings(value)
        return _short(value.class_path) + (f"({settings})" if settings else "")
    return str(value)
