"""Training of the attention predictor (DOTS, arXiv 2506.05316, section 4.2) on recorded success rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.difficulty.attention import AttentionPredictor, PredictorConfig
from datamodules.difficulty.outcomes import RecordedOutcomes
from datamodules.difficulty.visit_loss import average_measured, soft_loss, visit_forecasts
from datamodules.errors import UserError
from datamodules.seeding import derive_seed, generator

VALIDATION_REFERENCES = 4096


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the attention predictor is trained.

    Attributes:
        epochs: an epoch forecasts as many questions as there are to train on.
        learning_rate: of Adam, after a linear warm-up over min(100, 10%) of the steps; then it falls linearly to 0.
        references: drawn anew at every step, from the training questions; at most half of them.
        batch: questions forecast per step, none of them among the references.
        visits: visits that every step looks at.
        patience: epochs without a lower validation loss before it stops.
        seed: of weights, draws and dropout.
    """

    epochs: int = 60
    learning_rate: float = 1e-3
    references: int = 256
    batch: int = 256
    visits: int = 8
    patience: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.epochs, self.references, self.batch, self.visits, self.patience)
        if min(sizes) < 1 or not self.learning_rate > 0:
            raise UserError(
                f"training by {self}: expected epochs, references, batch, visits, patience >= 1 and learning_rate > 0"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A predictor with the weights of its best epoch, and the validation loss after each epoch (the first: before)."""

    predictor: AttentionPredictor
    losses: tuple[float, ...]

    @property
    def best_epoch(self) -> int:
        return int(np.argmin(self.losses))


def train_attention(
    config: PredictorConfig,
    embeddings: np.ndarray,
    outcomes: RecordedOutcomes,
    blocks: Sequence[int],
    train: np.ndarray,
    validation: np.ndarray,
    options: TrainingOptions,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Trained:
    """Trains adapters and calibration head by soft-label cross-entropy, and stops early on validation questions.

    Beyond the paper, a step looks at several visits at once (the weights are the same at each), and inputs are
    standardised on the training questions.

    Args:
        config: shape of the predictor.
        embeddings: float32 `[Q, E]` of all questions.
        outcomes: of all questions.
        blocks: components of each encoder that the embeddings are joined from; each block weighs alike.
        train: int64 rows of the `>= 2` questions to learn from.
        validation: int64 rows of the questions to stop by; their references are training questions.
        options: see `TrainingOptions`.
        progress: called with the epoch and its validation loss.
    """
    x, rates = torch.from_numpy(np.array(embeddings, dtype=np.float32)), torch.from_numpy(outcomes.rates)
    split = _split(rates, train, validation, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "predictor weights and dropout"))
        predictor = AttentionPredictor(config)
        _standardise(predictor, x[train], blocks)
        # Attention starts as a similarity kernel: equal adapters map like questions to like vectors.
        predictor.reference.load_state_dict(predictor.query.state_dict())
        losses = _run_epochs(predictor, x, rates, split, options, progress)
    return Trained(predictor.eval().requires_grad_(False), tuple(losses))


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """Rows to learn from, to validate on, and the references of validation."""

    train: np.ndarray
    validation: np.ndarray
    references: np.ndarray


def _split(rates: Tensor, train: np.ndarray, validation: np.ndarray, options: TrainingOptions) -> _Split:
    references = generator(options.seed, "validation references").permutation(train)[:VALIDATION_REFERENCES]
    shared = torch.isfinite(rates[references]).any(0) & torch.isfinite(rates[validation]).any(0)
    if not bool(shared.any()) or not bool((torch.isfinite(rates[train]).sum(0) >= 2).any()):
        raise UserError(
            f"{len(train)} training and {len(validation)} validation questions share no visit that measured enough of "
            "them, expected recorded outcomes of whole batches: give a longer record"
        )
    return _Split(train, validation, references)


class _BestWeights:
    """A copy of the weights of the lowest validation loss so far."""

    def __init__(self, predictor: AttentionPredictor, loss: float) -> None:
        self.loss, self.epoch = math.inf, 0
        self.offer(predictor, loss, 0)

    def offer(self, predictor: AttentionPredictor, loss: float, epoch: int) -> None:
        if loss < self.loss:
            self.loss, self.epoch = loss, epoch
            self._weights = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}

    def restore(self, predictor: AttentionPredictor) -> None:
        predictor.load_state_dict(self._weights)


def _run_epochs(
    predictor: AttentionPredictor,
    x: Tensor,
    rates: Tensor,
    split: _Split,
    options: TrainingOptions,
    progress: Callable[[int, float], None],
) -> list[float]:
    """Validation losses before and after each epoch; the predictor is left with the weights of the lowest."""
    rng = generator(options.seed, "predictor training")
    steps = math.ceil(len(split.train) / options.batch)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_then_linear(steps * options.epochs))
    losses = [_validate(predictor, x, rates, split)]
    best = _BestWeights(predictor, losses[0])
    for epoch in range(1, options.epochs + 1):
        predictor.train()
        for _ in range(steps):
            optimizer.zero_grad()
            _step_loss(predictor, x, rates, split.train, options, rng).backward()
            optimizer.step()
            schedule.step()
        losses.append(_validate(predictor, x, rates, split))
        progress(epoch, losses[-1])
        best.offer(predictor, losses[-1], epoch)
        if epoch - best.epoch >= options.patience:
            break
    best.restore(predictor)
    return losses


def _standardise(predictor: AttentionPredictor, x: Tensor, blocks: Sequence[int]) -> None:
    """Each component has variance 1 over the training questions, divided by the size of its block."""
    sizes = torch.repeat_interleave(torch.tensor(blocks), torch.tensor(blocks))
    deviation = x.std(0, correction=0) * sizes.sqrt()
    predictor.inputs.shift.copy_(x.mean(0))
    predictor.inputs.scale.copy_(torch.where(deviation > 1e-9, 1.0 / deviation.clamp(min=1e-9), 0.0))


def _warm_then_linear(total: int) -> Callable[[int], float]:
    warm = max(1, min(100, total // 10))
    return lambda step: min((step + 1) / warm, max(0.0, 1 - step / total))


def _step_loss(
    predictor: AttentionPredictor,
    x: Tensor,
    rates: Tensor,
    train: np.ndarray,
    options: TrainingOptions,
    rng: np.random.Generator,
) -> Tensor:
    measured = torch.isfinite(rates[train]).numpy()
    # Questions that one visit measured have references in common, however sparse the record is.
    anchor = rng.choice(np.flatnonzero(measured.sum(0) >= 2))
    order = rng.permutation(train[measured[:, anchor]])
    count = min(options.references, len(order) // 2)
    references, queries = order[:count], order[count : count + options.batch]
    others = rng.permutation(np.setdiff1d(np.arange(rates.shape[1]), [anchor]))[: options.visits - 1]
    visits = np.array([anchor, *others])
    known = rates[references][:, visits]
    base = average_measured(predictor.weights(x[queries], x[references]), known)
    return soft_loss(visit_forecasts(predictor.head, base, known), rates[queries][:, visits])


@torch.no_grad()
def _validate(predictor: AttentionPredictor, x: Tensor, rates: Tensor, split: _Split) -> float:
    predictor.eval()
    known = rates[split.references]
    base = average_measured(predictor.weights(x[split.validation], x[split.references]), known)
    return float(soft_loss(visit_forecasts(predictor.head, base, known), rates[split.validation]))
