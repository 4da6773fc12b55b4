"""The options of `dots difficulty`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from datamodules.difficulty.calibration import CalibrationName
from datamodules.errors import UserError

_OUTCOMES = (
    "folder of a run (its completions/*.parquet), a parquet of completions, or a JSONL of "
    '{"question", "pass_rate_by_epoch": [rate or null, ...]}'
)
_ENCODER = (
    "model folder or hub name; NAME@20 for the states of layer 20, `statistics` for counts of the text, several joined "
    "by +, e.g. statistics+models/encoder"
)


def fit_parser() -> DotsArgumentParser:
    """The parser of `dots difficulty fit`."""
    parser = command_parser(
        "difficulty fit",
        "Trains a predictor of success rates and measures it on questions that it has not seen. For example: "
        "dots difficulty fit --outcomes rates.jsonl --encoder statistics+ENCODER --out predictors/first --folds 5",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options")
    _add_common(parser)
    add("--encoder", type=str, required=True, help=_ENCODER)
    add("--out", type=str, required=True, help="folder of the predictor, results.json and reliability.png")
    add(
        "--method",
        type=Literal["kernel_ridge", "attention"],
        default="kernel_ridge",
        help="which one is saved: DOTS' trained adapters, or a kernel ridge score in their place; both are measured",
    )
    add("--folds", type=int, default=1, help="test parts measured in turn; the predictor of the first is saved")
    add("--test", type=float, default=0.2, help="share of the questions that is tested on, in each fold")
    add("--validation", type=float, default=0.1, help="share of the questions that attention stops early by")
    add("--learning_curve", type=bool, default=False, nargs="?", const=True, help="measure on fewer questions as well")
    add("--width", type=int, default=64, help="attention: width of the adapters (DOTS: 896)")
    add("--depth", type=int, default=1, help="attention: linear layers of an adapter (DOTS: 3)")
    add("--dropout", type=float, default=0.1, help="attention: dropout in the adapters")
    add("--input_dropout", type=float, default=0.5, help="attention: dropout of embedding components (DOTS: 0)")
    add("--calibration", type=CalibrationName, default="group_logit_temperature", help="calibration head")
    add("--epochs", type=int, default=60, help="attention: epochs at most (DOTS: 20)")
    add("--patience", type=int, default=15, help="attention: epochs without a lower validation loss")
    add("--learning_rate", type=float, default=1e-3, help="attention: peak of Adam's")
    add("--batch", type=int, default=256, help="attention: questions forecast per step")
    return parser


def evaluate_parser() -> DotsArgumentParser:
    """The parser of `dots difficulty evaluate`."""
    parser = command_parser(
        "difficulty evaluate",
        "Measures a predictor on other outcomes: references are drawn from the file, the rest is forecast. Questions "
        "that the predictor learnt from are left out.",
    )
    parser.add_argument("--predictor", type=str, required=True, help="folder that dots difficulty fit wrote")
    _add_common(parser)
    parser.add_argument("--encoder", type=str | None, default=None, help=_ENCODER + "; null for the predictor's own")
    parser.add_argument("--out", type=str | None, default=None, help="folder; null for PREDICTOR/evaluation")
    return parser


def read_options(parser: DotsArgumentParser, args: list[str]) -> Namespace:
    """Parses the command line. Raises UserError, or exits with one line, for options that cannot be used."""
    options = parser.parse_args(args)
    if not Path(options.outcomes).expanduser().exists():
        raise UserError(f"--outcomes {options.outcomes!r} does not exist, expected {_OUTCOMES}")
    for name in ("references", "folds", "width", "depth"):
        least = 2 if name == "references" else 1
        if name in options and options[name] < least:
            raise UserError(f"--{name} is {options[name]}, expected a number of at least {least}")
    for name in ("dropout", "input_dropout"):
        if name in options and not 0 <= options[name] < 1:
            raise UserError(f"--{name} is {options[name]}, expected a probability below 1")
    for name in ("test", "validation"):
        if name in options and not 0 < options[name] < 1:
            raise UserError(f"--{name} is {options[name]}, expected a share between 0 and 1")
    return options


def _add_common(parser: DotsArgumentParser) -> None:
    parser.add_argument("--outcomes", type=str, required=True, help=_OUTCOMES)
    parser.add_argument("--references", type=int, default=256, help="reference prompts at every visit, K")
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and weights")
    parser.add_argument("--cache_dir", type=str, default="~/.cache/dots", help="where embeddings are kept")
