"""Training of the attention predictor on recorded success rates (DOTS, arXiv 2506.05316, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # torch's own name for it

from datamodules.difficulty.attention import AttentionPredictor, PredictorConfig
from datamodules.difficulty.calibration import CalibrationHead
from datamodules.difficulty.outcomes import RecordedOutcomes
from datamodules.errors import UserError
from datamodules.seeding import derive_seed, generator

VALIDATION_REFERENCES = 4096


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Options of the predictor's training.

    Attributes:
        epochs: number of epochs; an epoch forecasts as many questions as there are to train on.
        learning_rate: peak of Adam's learning rate, reached by a linear warm-up over min(100, 10%) of the steps and
            followed by linear decay to 0.
        references: references per step, drawn from the training questions; at most half of them are used.
        batch: questions forecast per step, none of them a reference.
        visits: visits per step.
        patience: epochs without a lower validation loss before training stops.
        seed: seed of weights, draws and dropout.
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
                f"{self} is not usable, expected epochs, references, batch, visits and patience >= 1 and "
                "learning_rate > 0. Change these options."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A predictor with the weights of its best epoch, and the validation loss before training and after each epoch."""

    predictor: AttentionPredictor
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """Embeddings `x` `[Q, E]`, rates `[Q, V]` and the rows to train on, to validate on and to validate from."""

    x: Tensor
    rates: Tensor
    train: np.ndarray
    validation: np.ndarray
    references: np.ndarray


def train_attention(
    config: PredictorConfig,
    embeddings: np.ndarray,
    outcomes: RecordedOutcomes,
    blocks: Sequence[int],
    train: np.ndarray,
    validation: np.ndarray,
    options: TrainingOptions,
) -> Trained:
    """Train adapters and calibration head by soft-label cross-entropy, with early stopping on validation questions.

    Beyond the paper, a step uses several visits at once (the attention weights are the same at each), and inputs are
    standardised on the training questions.

    Args:
        config: shape of the predictor.
        embeddings: float32 `[Q, E]` of all questions.
        outcomes: recorded outcomes of all questions.
        blocks: components of each encoder that was joined into the embeddings; all blocks get equal weight.
        train: int64 rows of the `>= 2` questions to train on.
        validation: int64 rows of the questions to validate on; their references are training questions.
        options: options of the training.

    Raises:
        UserError: training and validation questions share no visit.
    """
    x, rates = torch.from_numpy(np.array(embeddings, dtype=np.float32)), torch.from_numpy(outcomes.rates)
    references = generator(options.seed, "validation references").permutation(train)[:VALIDATION_REFERENCES]
    shared = torch.isfinite(rates[references]).any(0) & torch.isfinite(rates[validation]).any(0)
    if not bool(shared.any()) or not bool((torch.isfinite(rates[train]).sum(0) >= 2).any()):
        raise UserError(
            f"The {len(train)} training and {len(validation)} validation questions share no visit that measured enough "
            "of them, expected recorded outcomes of whole batches. Use a longer record."
        )
    record = _Record(x, rates, train, validation, references)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "predictor weights and dropout"))
        predictor = AttentionPredictor(config)
        # Variance 1 over the training questions, divided by the size of the component's block.
        sizes = torch.repeat_interleave(torch.tensor(blocks), torch.tensor(blocks))
        deviation = x[train].std(0, correction=0) * sizes.sqrt()
        predictor.inputs.shift.copy_(x[train].mean(0))
        predictor.inputs.scale.copy_(torch.where(deviation > 1e-9, 1.0 / deviation.clamp(min=1e-9), 0.0))
        # With equal adapters, attention starts as a similarity kernel.
        predictor.reference.load_state_dict(predictor.query.state_dict())
        losses = _run_epochs(predictor, record, options)
    return Trained(predictor.eval().requires_grad_(False), tuple(losses))


def _run_epochs(predictor: AttentionPredictor, record: _Record, options: TrainingOptions) -> list[float]:
    """Train to the weights of lowest validation loss; return the losses before training and after each epoch."""
    rng = generator(options.seed, "predictor training")
    steps = math.ceil(len(record.train) / options.batch)
    total = steps * options.epochs
    warm = max(1, min(100, total // 10))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, 1 - step / total))
    )
    losses = [_validate(predictor, record)]
    best_loss, best_epoch = losses[0], 0
    best = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
    for epoch in range(1, options.epochs + 1):
        predictor.train()
        for _ in range(steps):
            optimizer.zero_grad()
            _step_loss(predictor, record, options, rng).backward()
            optimizer.step()
            schedule.step()
        losses.append(_validate(predictor, record))
        if losses[-1] < best_loss:
            best_loss, best_epoch = losses[-1], epoch
            best = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
        if epoch - best_epoch >= options.patience:
            break
    predictor.load_state_dict(best)
    return losses


def _step_loss(
    predictor: AttentionPredictor, record: _Record, options: TrainingOptions, rng: np.random.Generator
) -> Tensor:
    x, rates, train = record.x, record.rates, record.train
    measured = torch.isfinite(rates[train]).numpy()
    # Questions measured at the same visit have references in common, however sparse the record is.
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
def _validate(predictor: AttentionPredictor, record: _Record) -> float:
    predictor.eval()
    known = record.rates[record.references]
    base = average_measured(predictor.weights(record.x[record.validation], record.x[record.references]), known)
    return float(soft_loss(visit_forecasts(predictor.head, base, known), record.rates[record.validation]))


def average_measured(weights: Tensor, rates: Tensor) -> Tensor:
    """Return the weighted average rate at each visit over the references measured there, `[N, V]`.

    Attention weights `[N, K]` (rows sum to one) do not depend on the visit, so one pass of the adapters serves all
    visits. Dividing by the weight of the measured references equals the softmax over them alone. `rates` `[K, V]` are
    NaN where not measured, the result at visits that measured no reference.
    """
    measured = torch.isfinite(rates)
    share = weights @ measured.float()
    return torch.where(share > 0, weights @ torch.nan_to_num(rates) / share.clamp(min=1e-12), torch.nan)


def visit_forecasts(head: CalibrationHead, base: Tensor, references: Tensor) -> Tensor:
    """Return calibrated forecasts `[N, V]` of `base` `[N, V]`, given rates of `references` `[K, V]` (may be NaN)."""
    columns = []
    for visit in range(base.shape[1]):
        measured = references[torch.isfinite(references[:, visit]), visit]
        # Without a reference there is neither a base forecast nor a mean for the head.
        columns.append(head(base[:, visit], measured) if len(measured) else base[:, visit])
    return torch.stack(columns, dim=1)


def soft_loss(forecasts: Tensor, rates: Tensor) -> Tensor:
    """Return the mean soft-label cross-entropy of forecasts `[N, V]` where rates `[N, V]` and forecasts are finite."""
    kept = torch.isfinite(rates) & torch.isfinite(forecasts.detach())
    # Averages may end just outside [0, 1]; a narrower clamp would stop the gradient of the worst forecasts.
    return F.binary_cross_entropy(forecasts[kept].clamp(0, 1), rates[kept])
