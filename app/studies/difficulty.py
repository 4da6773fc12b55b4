"""`dots difficulty fit` and `dots difficulty evaluate`: a predictor of success rates from recorded outcomes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from rich.progress import track

from app.studies import difficulty_forecasters as forecasters
from app.studies.difficulty_forecasters import METHODS, Material, fit_predictor
from app.studies.difficulty_options import evaluate_parser, fit_parser, read_options
from app.studies.difficulty_report import CurvePoint, draw_curve, draw_reliability, print_results, write_results
from app.studies.difficulty_scoring import Scored, score
from datamodules.difficulty.attention import AttentionPredictor, PredictorConfig
from datamodules.difficulty.encoders import block_widths, embed_with
from datamodules.difficulty.outcomes import (
    QuestionSplit,
    RecordedOutcomes,
    question_key,
    read_outcomes,
    split_questions,
)
from datamodules.difficulty.training import TrainingOptions
from datamodules.errors import UserError, nearest
from datamodules.seeding import generator

UNSEEN = ", references unseen too"
SEEN = "seen_questions.json"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

Results = dict[str, list[Scored]]
"""What every method reached, fold by fold."""


def main(args: list[str]) -> None:
    """Runs `dots difficulty ACTION` with the arguments that follow it."""
    actions = {"fit": _fit, "evaluate": _evaluate}
    if not args or args[0] not in (*actions, "-h", "--help"):
        given = repr(args[0]) if args else "nothing"
        raise UserError(f"dots difficulty got {given}, expected an action: {nearest(args[0] if args else '', actions)}")
    if args[0] in actions:
        actions[args[0]](args[1:])
    else:
        print("dots difficulty fit|evaluate: train or evaluate a difficulty predictor; add --help to either")


def _fit(args: list[str]) -> None:
    options = read_options(fit_parser(), args)
    out = _new_folder(options.out)
    outcomes = read_outcomes(Path(options.outcomes))
    with _material(outcomes, options.encoder, Path(options.cache_dir)) as material:
        splits = [
            split_questions(outcomes.questions, options.seed, options.validation, options.test, fold)
            for fold in range(options.folds)
        ]
        results: Results = {}
        for fold, split in enumerate(track(splits, "folds", transient=True)):
            for name, forecaster, predictor in _contenders(material, split, options):
                results.setdefault(name, []).append(_score_held_out(forecaster, material, split, options))
                unseen = score(forecaster, outcomes, split.test, split.test, options.references, options.seed)
                results.setdefault(name + UNSEEN, []).append(unseen)
                if fold == 0 and name == options.method and predictor is not None:
                    predictor.save(out)
                    _write_seen(out, outcomes, split)
        title = f"{len(splits[0].test)} questions never seen, of {len(outcomes.questions)}" + (
            f"; mean and deviation over {options.folds} folds" if options.folds > 1 else ""
        )
        write_results(out / "results.json", results, _settings(options, outcomes, splits[0]))
        draw_reliability(out / "reliability.png", {name: results[name] for name in results if UNSEEN not in name})
        print_results(title, results)
        if options.learning_curve:
            points = list(_learning_curve(material, splits, options))
            draw_curve(out, points)


def _evaluate(args: list[str]) -> None:
    options = read_options(evaluate_parser(), args)
    folder = Path(options.predictor).expanduser()
    predictor = AttentionPredictor.load(folder)
    encoder = options.encoder or predictor.config.encoder
    if encoder is None:
        raise UserError(f"predictor {options.predictor!r} names no encoder: give --encoder")
    outcomes = read_outcomes(Path(options.outcomes))
    unseen = _rows_not_seen(folder, outcomes)
    with _material(outcomes, encoder, Path(options.cache_dir)) as material:
        contenders = {
            "predictor": forecasters.trained(predictor, material),
            "kernel": forecasters.kernel(material),
            "mean": forecasters.mean(material),
        }
        results: Results = {
            name: [score(one, outcomes, unseen, unseen, options.references, options.seed)]
            for name, one in contenders.items()
        }
    if not len(results["mean"][0].forecast):
        raise UserError(
            f"{len(unseen)} of the {len(outcomes.questions)} questions in {options.outcomes!r} were not learnt from, "
            "too few to forecast some from others: give other outcomes"
        )
    out = Path(options.out).expanduser() if options.out else folder / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    settings = {"predictor": str(folder), "outcomes": options.outcomes, "encoder": encoder, "seed": options.seed}
    counts = {"questions": len(outcomes.questions), "not_learnt_from": len(unseen)}
    write_results(out / "results.json", results, settings | counts)
    draw_reliability(out / "reliability.png", results)
    print_results(f"{len(unseen)} questions, {len(outcomes.questions) - len(unseen)} more left out as learnt", results)


def _contenders(
    material: Material, split: QuestionSplit, options: Namespace
) -> Iterator[tuple[str, forecasters.Forecaster, AttentionPredictor | None]]:
    seen = np.concatenate([split.train, split.validation])
    for method in METHODS:
        predictor = fit_predictor(method, material, split, _config(material, options), _training(options))
        yield method, forecasters.trained(predictor, material), predictor
    yield "ridge on embeddings", forecasters.linear_ridge(material, seen), None
    yield "kernel, untrained", forecasters.kernel(material), None
    yield "mean of references", forecasters.mean(material), None


def _learning_curve(material: Material, splits: list[QuestionSplit], options: Namespace) -> Iterator[CurvePoint]:
    """Scores of methods that learnt from shares of the training questions; the references stay the same."""
    jobs = [(share, split) for share in SHARES for split in splits]
    for share, split in track(jobs, "learning curve", transient=True):
        part = QuestionSplit(
            _share(split.train, share, options.seed), _share(split.validation, share, options.seed), split.test
        )
        if min(len(part.train), len(part.validation)) < 2:
            continue
        seen = np.concatenate([part.train, part.validation])
        # Folds differ by a question at most; the first one's size stands for all.
        size = round(share * (len(splits[0].train) + len(splits[0].validation)))
        for method in METHODS:
            predictor = fit_predictor(method, material, part, _config(material, options), _training(options))
            found = _score_held_out(forecasters.trained(predictor, material), material, split, options)
            yield CurvePoint(method, size, found.figures)
        found = _score_held_out(forecasters.linear_ridge(material, seen), material, split, options)
        yield CurvePoint("ridge on embeddings", size, found.figures)


def _share(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The first part of a random order: a larger share holds a smaller one."""
    return np.sort(generator(seed, "learning curve").permutation(rows)[: round(share * len(rows))])


def _score_held_out(
    forecaster: forecasters.Forecaster, material: Material, split: QuestionSplit, options: Namespace
) -> Scored:
    candidates = np.concatenate([split.train, split.validation])
    return score(forecaster, material.outcomes, split.test, candidates, options.references, options.seed)


@contextmanager
def _material(outcomes: RecordedOutcomes, encoder: str, cache_dir: Path) -> Iterator[Material]:
    """Embeddings are kept in the cache; what each method makes of them is not."""
    embeddings, key = embed_with(encoder, outcomes.questions, cache_dir)
    blocks = block_widths(encoder, outcomes.questions, cache_dir)
    with tempfile.TemporaryDirectory(prefix="dots-difficulty-") as scratch:
        yield Material(outcomes, embeddings, key, blocks, Path(scratch))


def _config(material: Material, options: Namespace) -> PredictorConfig:
    return PredictorConfig(
        in_features=material.embeddings.shape[1],
        width=options.width,
        depth=options.depth,
        dropout=options.dropout,
        input_dropout=options.input_dropout,
        calibration=options.calibration,
        encoder=options.encoder,
    )


def _training(options: Namespace) -> TrainingOptions:
    return TrainingOptions(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        references=options.references,
        batch=options.batch,
        patience=options.patience,
        seed=options.seed,
    )


def _settings(options: Namespace, outcomes: RecordedOutcomes, split: QuestionSplit) -> dict[str, Any]:
    sizes = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    return {key: value for key, value in vars(options).items() if key != "config"} | {
        "questions": len(outcomes.questions),
        "visits": outcomes.rates.shape[1],
        **{f"{name}_questions": size for name, size in sizes.items()},
    }


def _new_folder(out: str) -> Path:
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; give a new one")
    return folder


def _write_seen(folder: Path, outcomes: RecordedOutcomes, split: QuestionSplit) -> None:
    """Keeps hashes of the questions learnt from, so that `evaluate` never scores one."""
    rows = np.sort(np.concatenate([split.train, split.validation]))
    hashes = [_hash(outcomes.questions[row]) for row in rows]
    (folder / SEEN).write_text(json.dumps(hashes, indent=0) + "\n", encoding="utf-8")


def _rows_not_seen(folder: Path, outcomes: RecordedOutcomes) -> np.ndarray:
    path = folder / SEEN
    seen = set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()
    return np.array(
        [row for row, question in enumerate(outcomes.questions) if _hash(question) not in seen], dtype=np.int64
    )


def _hash(question: str) -> str:
    return hashlib.blake2b(question_key(question).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
