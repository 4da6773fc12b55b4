"""Train and evaluate a predictor of success rates from recorded outcomes (`dots difficulty fit|evaluate|import`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse import Namespace
from rich.progress import track

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from app.studies.difficulty import forecasters
from app.studies.difficulty.forecasters import METHODS, Forecaster, Material, Scored, fit_predictor, score, trained
from app.studies.difficulty.report import draw_curve, draw_reliability, print_results, write_results
from datamodules.difficulty.attention import AttentionPredictor
from datamodules.difficulty.calibration import CalibrationName
from datamodules.difficulty.outcomes import (
    QuestionSplit,
    RecordedOutcomes,
    question_key,
    read_outcomes,
    split_questions,
)
from datamodules.difficulty.published import read_published
from datamodules.errors import UserError, nearest
from datamodules.seeding import generator

UNSEEN = ", references unseen too"
SEEN = "seen_questions.json"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

_METHOD = "which one is saved: DOTS' trained adapters, or a kernel ridge score in their place; both are measured"
_OUTCOMES = (
    "one or several records, each of its own model or checkpoints: folder of a run or of dots predict (its "
    "completions/*.parquet), a parquet of completions, or a JSONL or parquet of "
    '{"question", "pass_rate_by_epoch": [rate or null, ...]}, of one pass_rate, Big-Math\'s or Skywork\'s columns, '
    "or samples of lm-eval-harness"
)
_ENCODER = (
    "model folder or hub name; NAME@20 for the states of layer 20, `statistics` for counts of the text, `words` for "
    "its hashed words; several joined by +, e.g. statistics+words+models/encoder"
)


def main(args: list[str]) -> None:
    """Run `dots difficulty ACTION` with the arguments that follow it."""
    actions = {"fit": _fit, "evaluate": _evaluate, "import": _import}
    if not args or args[0] not in (*actions, "-h", "--help"):
        given = repr(args[0]) if args else "nothing"
        hint = nearest(args[0] if args else "", actions)
        raise UserError(f"dots difficulty was given {given}, expected an action: {hint}")
    if args[0] in actions:
        actions[args[0]](args[1:])
    else:
        print("dots difficulty fit|evaluate|import: train, measure or import a predictor; add --help to one")


def _fit(args: list[str]) -> None:
    options = read_options(fit_parser(), args)
    out = _new_folder(options.out)
    outcomes = read_outcomes(*map(Path, options.outcomes))
    with Material.of(outcomes, options.encoder, Path(options.cache_dir)) as material:
        splits = [
            split_questions(outcomes.questions, options.seed, options.validation, options.test, fold)
            for fold in range(options.folds)
        ]
        results: dict[str, list[Scored]] = {}
        for fold, split in enumerate(track(splits, "folds", transient=True)):
            for name, forecaster, predictor in _contenders(material, split, options):
                results.setdefault(name, []).append(_score_held_out(forecaster, material, split, options))
                unseen = score(forecaster, outcomes, split.test, split.test, options.references, options.seed)
                results.setdefault(name + UNSEEN, []).append(unseen)
                if fold == 0 and name == options.method and predictor is not None:
                    predictor.save(out)
                    # Hashes of the questions learnt from, so that `evaluate` never scores one.
                    rows = np.sort(np.concatenate([split.train, split.validation]))
                    seen = [_hash(outcomes.questions[row]) for row in rows]
                    (out / SEEN).write_text(json.dumps(seen, indent=0) + "\n", encoding="utf-8")
        first = splits[0]
        settings = {key: value for key, value in vars(options).items() if key != "config"} | {
            "questions": len(outcomes.questions),
            "visits": outcomes.rates.shape[1],
            "train_questions": len(first.train),
            "validation_questions": len(first.validation),
            "test_questions": len(first.test),
        }
        write_results(out / "results.json", results, settings)
        draw_reliability(out / "reliability.png", {name: results[name] for name in results if UNSEEN not in name})
        title = f"{len(first.test)} questions never seen, of {len(outcomes.questions)}"
        if options.folds > 1:
            title += f"; mean and deviation over {options.folds} folds"
        print_results(title, results)
        if options.learning_curve:
            draw_curve(out, list(_learning_curve(material, splits, options)))


def _evaluate(args: list[str]) -> None:
    options = read_options(evaluate_parser(), args)
    folder = Path(options.predictor).expanduser()
    predictor = AttentionPredictor.load(folder)
    encoder = options.encoder or predictor.config.encoder
    if encoder is None:
        raise UserError(f"--predictor {options.predictor} names no encoder, expected one. Give --encoder.")
    outcomes = read_outcomes(*map(Path, options.outcomes))
    learnt = set(json.loads((folder / SEEN).read_text(encoding="utf-8"))) if (folder / SEEN).is_file() else set()
    unseen = np.array(
        [row for row, question in enumerate(outcomes.questions) if _hash(question) not in learnt], dtype=np.int64
    )
    with Material.of(outcomes, encoder, Path(options.cache_dir)) as material:
        contenders = {"predictor": trained(predictor, material), "kernel": forecasters.kernel(material)}
        contenders |= {"length": forecasters.length(material), "mean": forecasters.mean(material)}
        results = {
            name: [score(one, outcomes, unseen, unseen, options.references, options.seed)]
            for name, one in contenders.items()
        }
    if not len(results["mean"][0].forecast):
        raise UserError(
            f"--outcomes {' '.join(options.outcomes)} has {len(unseen)} of {len(outcomes.questions)} questions that it "
            "did not learn from, too few to forecast some from others. Give other outcomes."
        )
    out = Path(options.out).expanduser() if options.out else folder / "evaluation"
    settings = {"predictor": str(folder), "outcomes": options.outcomes, "encoder": encoder, "seed": options.seed}
    counts = {"questions": len(outcomes.questions), "not_learnt_from": len(unseen)}
    write_results(out / "results.json", results, settings | counts)
    draw_reliability(out / "reliability.png", results)
    print_results(f"{len(unseen)} questions; {len(outcomes.questions) - len(unseen)} left out as learnt from", results)


def _import(args: list[str]) -> None:
    options = import_parser().parse_args(args)
    out = _new_folder(options.out)
    predictor = read_published(Path(options.file).expanduser(), options.encoder)
    predictor.save(out)
    config = predictor.config
    print(
        f"{out}: {config.depth} layers of width {config.width} on {config.in_features} components of {config.encoder}, "
        f"calibration {config.calibration}. Use it by data.selector.predictor={out}"
    )


def _contenders(
    material: Material, split: QuestionSplit, options: Namespace
) -> Iterator[tuple[str, Forecaster, AttentionPredictor | None]]:
    """Yield every method's name and forecaster, with the predictor where there is one to save."""
    for method in METHODS:
        predictor = fit_predictor(method, material, split, options)
        yield method, trained(predictor, material), predictor
    rows = np.concatenate([split.train, split.validation])
    yield "ridge on embeddings", forecasters.linear_ridge(material, rows), None
    yield "kernel, untrained", forecasters.kernel(material), None
    yield "length of the text", forecasters.length(material), None
    yield "mean of references", forecasters.mean(material), None


def _learning_curve(material: Material, splits: list[QuestionSplit], options: Namespace) -> Iterator[dict[str, object]]:
    """Yield scores of methods that learnt from a share of the training questions, or from the first visits alone.

    The references and the tested visits stay the same.
    """

    def part_of(rows: np.ndarray, share: float) -> np.ndarray:
        # The first part of a random order: a larger share contains a smaller one.
        shuffled = generator(options.seed, "learning curve").permutation(rows)
        return np.sort(shuffled[: round(share * len(rows))])

    rates = material.outcomes.rates
    visits = sorted({max(1, round(share * rates.shape[1])) for share in SHARES})
    sizes = [(share, visits[-1]) for share in SHARES] + [(1.0, count) for count in visits[:-1]]
    for (share, count), split in track([(size, split) for size in sizes for split in splits], "curve", transient=True):
        part = QuestionSplit(part_of(split.train, share), part_of(split.validation, share), split.test)
        if min(len(part.train), len(part.validation)) < 2:
            continue
        outcomes = RecordedOutcomes(material.outcomes.questions, rates[:, :count])
        learnt_from = replace(material, outcomes=outcomes)
        # Folds differ by at most one question, so the first one's size is used for all.
        size = round(share * (len(splits[0].train) + len(splits[0].validation)))
        methods = {name: trained(fit_predictor(name, learnt_from, part, options), material) for name in METHODS}
        rows = np.concatenate([part.train, part.validation])
        methods["ridge on embeddings"] = forecasters.linear_ridge(learnt_from, rows)
        for name, forecaster in methods.items():
            figures = _score_held_out(forecaster, material, split, options).figures
            yield {"method": name, "questions": size, "visits": count, **figures}


def _score_held_out(forecaster: Forecaster, material: Material, split: QuestionSplit, options: Namespace) -> Scored:
    """Score the test questions, with references from those learnt from."""
    candidates = np.concatenate([split.train, split.validation])
    return score(forecaster, material.outcomes, split.test, candidates, options.references, options.seed)


def _hash(question: str) -> str:
    return hashlib.blake2b(question_key(question).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _new_folder(name: str) -> Path:
    out = Path(name).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {name} exists and is not an empty folder. Give a new folder.")
    return out


def import_parser() -> DotsArgumentParser:
    """Return the parser of `dots difficulty import`."""
    parser = command_parser(
        "difficulty import",
        "Reads a predictor that the code of DOTS' authors trained, a torch file of weights. Nothing in it is executed. "
        "For example: dots difficulty import --file model_final.pt --out predictors/published",
    )
    parser.add_argument("--file", type=str, required=True, help="the authors' predictor, such as model_final.pt")
    parser.add_argument("--out", type=str, required=True, help="folder of the predictor")
    parser.add_argument("--encoder", type=str, default="Qwen/Qwen2.5-Math-1.5B-Instruct", help=_ENCODER)
    return parser


def fit_parser() -> DotsArgumentParser:
    """Return the parser of `dots difficulty fit`."""
    parser = command_parser(
        "difficulty fit",
        "Trains a predictor of success rates and measures it on questions that it has not seen. For example: "
        "dots difficulty fit --outcomes rates.jsonl --encoder statistics+words+ENCODER --out predictors/one --folds 5",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options")
    _add_common(parser)
    add("--encoder", type=str, required=True, help=_ENCODER)
    add("--out", type=str, required=True, help="folder of the predictor, results.json and reliability.png")
    add("--method", type=Literal["kernel_ridge", "attention"], default="kernel_ridge", help=_METHOD)
    add("--folds", type=int, default=1, help="test parts measured in turn; the predictor of the first is saved")
    add("--test", type=float, default=0.2, help="share of the questions that each fold tests on")
    add("--validation", type=float, default=0.1, help="share of the questions for the early stopping of attention")
    add(
        "--learning_curve", type=bool, default=False, nargs="?", const=True, help="also from fewer questions and visits"
    )
    add("--width", type=int, default=64, help="attention: width of the adapters (DOTS: 896)")
    add("--depth", type=int, default=1, help="attention: linear layers of an adapter (DOTS: 3)")
    add("--dropout", type=float, default=0.1, help="attention: dropout in the adapters")
    add("--input_dropout", type=float, default=0.5, help="attention: dropout of embedding components (DOTS: 0)")
    add("--calibration", type=CalibrationName, default="group_logit_temperature", help="calibration head")
    add("--epochs", type=int, default=60, help="attention: maximum number of epochs (DOTS: 20)")
    add("--patience", type=int, default=15, help="attention: epochs without a lower validation loss")
    add("--learning_rate", type=float, default=1e-3, help="attention: peak learning rate of Adam")
    add("--batch", type=int, default=256, help="attention: questions forecast per step")
    return parser


def evaluate_parser() -> DotsArgumentParser:
    """Return the parser of `dots difficulty evaluate`."""
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


def _add_common(parser: DotsArgumentParser) -> None:
    parser.add_argument("--outcomes", type=str, nargs="+", required=True, help=_OUTCOMES)
    parser.add_argument("--references", type=int, default=256, help="reference prompts at every visit, K")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, draws and weights")
    parser.add_argument("--cache_dir", type=str, default="~/.cache/dots", help="folder of cached embeddings")


def read_options(parser: DotsArgumentParser, args: list[str]) -> Namespace:
    """Parse the command line. Raise UserError, or exit with one line, for options that cannot be used."""
    options = parser.parse_args(args)
    for outcomes in options.outcomes:
        if not Path(outcomes).expanduser().exists():
            raise UserError(f"--outcomes {outcomes} does not exist. Give {_OUTCOMES}.")
    for name, least in (("references", 2), ("folds", 1), ("width", 1), ("depth", 1)):
        if name in options and options[name] < least:
            raise UserError(f"--{name} is {options[name]}, expected at least {least}. Give a larger number.")
    for name in ("dropout", "input_dropout"):
        if name in options and not 0 <= options[name] < 1:
            raise UserError(f"--{name} is {options[name]}, expected a probability below 1. Give for example 0.1.")
    for name in ("test", "validation"):
        if name in options and not 0 < options[name] < 1:
            raise UserError(f"--{name} is {options[name]}, expected a share between 0 and 1. Give for example 0.2.")
    return options
