"""Training on worlds of known difficulty, and closed forms against direct computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.reporting.forecast_quality import pearson
from app.studies.difficulty.forecasters import Material, kernel, linear_ridge, trained
from datamodules.difficulty import training
from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace, PredictorConfig
from datamodules.difficulty.calibration import HEADS
from datamodules.difficulty.outcomes import RecordedOutcomes, split_questions
from datamodules.difficulty.ridge import RIDGES, fit_kernel_ridge, fit_ridge
from datamodules.difficulty.training import (
    TrainingOptions,
    average_measured,
    soft_loss,
    train_attention,
    visit_forecasts,
)
from datamodules.errors import UserError
from datamodules.seeding import generator

SMALL = PredictorConfig(in_features=32, width=32, depth=1, input_dropout=0.2)


class World:
    """Success depends on one of 32 directions, a small part of the similarity of texts; the policy improves."""

    def __init__(self, folder: Path, size: int = 500, visits: int = 6, measured: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.embeddings = rng.normal(size=(size, 32)).astype(np.float32)
        logit = 2.0 * self.embeddings[:, 3:4] + np.linspace(-1, 1, visits)
        self.truth = 1 / (1 + np.exp(-logit))
        rates = rng.binomial(8, self.truth) / 8
        rates[rng.uniform(size=rates.shape) >= measured] = np.nan
        questions = [f"question {index}" for index in range(size)]
        self.outcomes = RecordedOutcomes(questions, rates.astype(np.float32))
        self.split = split_questions(questions, seed=0)
        self.material = Material(self.outcomes, self.embeddings, "world", [32], folder)

    def pearson(self, forecaster, visit: int = 2) -> float:
        """Return the correlation with the true success of unseen questions, given 100 references of the visit."""
        known = self.split.train[np.isfinite(self.outcomes.rates[self.split.train, visit])][:100]
        forecast = forecaster(known, self.outcomes.rates[known, visit].astype(np.float64))
        return pearson(forecast[self.split.test], self.truth[self.split.test, visit])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def fitted(world):
    s = world.split
    return train_attention(
        SMALL, world.embeddings, world.outcomes, [32], s.train, s.validation,
        TrainingOptions(epochs=120, references=100, batch=100, learning_rate=3e-3),
    )  # fmt: skip


def test_training_finds_what_the_kernel_cannot(world, fitted):
    untrained = world.pearson(kernel(world.material))
    assert world.pearson(trained(fitted.predictor, world.material)) > max(0.85, untrained + 0.15)
    rows = np.concatenate([world.split.train, world.split.validation])
    ridge = fit_kernel_ridge(world.embeddings[rows], world.outcomes.take(rows), [32])
    assert world.pearson(trained(ridge, world.material)) > max(0.85, untrained + 0.15)
    assert world.pearson(linear_ridge(world.material, rows)) > max(0.85, untrained + 0.15)


def test_forecasts_follow_the_references(world, fitted):
    """The same predictor on a weaker and a stronger policy."""
    forecaster, rows = trained(fitted.predictor, world.material), world.split.train[:100]
    early, late = (forecaster(rows, world.outcomes.rates[rows, visit].astype(float)) for visit in (0, 5))
    for forecast, visit in ((early, 0), (late, 5)):
        test = world.split.test
        assert forecast[test].mean() == pytest.approx(world.truth[test, visit].mean(), abs=0.06)


def test_a_sparse_record_teaches_too(tmp_path):
    world = World(tmp_path, size=600, visits=12, measured=0.2)
    s = world.split
    options = TrainingOptions(epochs=60, references=40, batch=80, learning_rate=3e-3)
    made = train_attention(SMALL, world.embeddings, world.outcomes, [32], s.train, s.validation, options)
    untrained = world.pearson(kernel(world.material))
    assert world.pearson(trained(made.predictor, world.material)) > untrained + 0.15


def test_early_stopping_restores_the_best(world):
    s = world.split
    arguments = (SMALL, world.embeddings, world.outcomes, [32], s.train, s.validation)
    # The learning rate is so high that training soon gets worse.
    options = TrainingOptions(epochs=30, references=100, batch=100, learning_rate=0.03, patience=4)
    made = train_attention(*arguments, options)
    best_epoch = int(np.argmin(made.losses))
    assert 0 < best_epoch == len(made.losses) - 1 - options.patience < options.epochs - options.patience
    assert made.losses[-1] > made.losses[best_epoch]
    x, rates = torch.from_numpy(world.embeddings), torch.from_numpy(world.outcomes.rates)
    references = generator(options.seed, "validation references").permutation(s.train)
    record = training._Record(x, rates, s.train, s.validation, references)
    assert training._validate(made.predictor, record) == pytest.approx(min(made.losses), abs=1e-7)
    assert not made.predictor.training


def test_equal_seeds_train_equal_predictors(world):
    s, marks = world.split, []
    for seed in (1, 1, 2):
        torch.manual_seed(len(marks))  # the global generator must not matter
        options = TrainingOptions(epochs=2, references=50, batch=50, seed=seed)
        made = train_attention(SMALL, world.embeddings, world.outcomes, [32], s.train, s.validation, options)
        marks.append(made.predictor.fingerprint())
    assert marks[0] == marks[1] != marks[2]


def test_save_and_load_give_identical_forecasts(world, fitted, tmp_path):
    rows = world.split.train
    ridge = fit_kernel_ridge(world.embeddings[rows], world.outcomes.take(rows), [32], encoder="somewhere")
    for number, predictor in enumerate((fitted.predictor, ridge)):
        predictor.save(tmp_path / str(number))
        loaded = AttentionPredictor.load(tmp_path / str(number))
        assert loaded.config == predictor.config
        rates = world.outcomes.rates[rows[:50], 1].astype(np.float64)
        before, after = (trained(one, world.material)(rows[:50], rates) for one in (predictor, loaded))
        np.testing.assert_array_equal(before, after)


def test_no_common_visit_is_a_user_error(world):
    rates = np.full_like(world.outcomes.rates, np.nan)
    rates[world.split.train, 0] = 0.5
    rates[world.split.validation, 1] = 0.5
    outcomes = RecordedOutcomes(world.outcomes.questions, rates)
    s = world.split
    with pytest.raises(UserError, match="share no visit"):
        train_attention(SMALL, world.embeddings, outcomes, [32], s.train, s.validation, TrainingOptions())


def test_ridge_leave_one_out_against_refitting():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(25, 6)), rng.uniform(size=25)
    kernel_matrix = np.exp(-0.5 * ((x[:, None] - x) ** 2).sum(-1))
    fit = fit_ridge(kernel_matrix, y)
    errors = []
    for ridge in RIDGES:
        forecasts = []
        for i in range(25):
            kept = np.delete(np.arange(25), i)
            weights = np.linalg.solve(kernel_matrix[np.ix_(kept, kept)] + ridge * np.eye(24), y[kept] - y.mean())
            forecasts.append(y.mean() + kernel_matrix[i, kept] @ weights)
        errors.append(np.mean((y - forecasts) ** 2))
        if ridge == fit.ridge:
            np.testing.assert_allclose(fit.held_out, forecasts, atol=1e-9)
    assert fit.ridge == RIDGES[np.argmin(errors)]
    assert fit.error == pytest.approx(min(errors))
    in_sample = y.mean() + kernel_matrix @ fit.coefficients
    np.testing.assert_allclose(in_sample - fit.own, fit.held_out, atol=1e-9)


def test_the_ridge_adapter_is_the_regressions_and_references_leave_themselves_out(world, tmp_path):
    rows, blocks = world.split.train[:80], [12, 20]
    predictor = fit_kernel_ridge(world.embeddings[rows], world.outcomes.take(rows), blocks)
    scale = predictor.inputs.scale.numpy().astype(np.float64)
    u = (world.embeddings - predictor.inputs.shift.numpy()) * scale
    squared = [((part[:, None] - part[rows]) ** 2).sum(-1) for part in np.split(u, blocks[:1], axis=1)]
    targets, members = world.outcomes.take(rows).means, []
    for weights in predictor.query.precision.numpy().astype(np.float64):
        kernel_matrix = np.exp(-0.5 * sum(weight * part for weight, part in zip(weights, squared, strict=True)))
        members.append((kernel_matrix, fit_ridge(kernel_matrix[rows], targets)))
    # The sum forecasts held-out questions better than each member: weights by least squares of their forecasts.
    mean = targets.mean()
    held_out = np.stack([fit.held_out - mean for _, fit in members], axis=1)
    stacked = np.linalg.lstsq(held_out, targets - mean, rcond=None)[0]
    assert (stacked > 0).all()
    gain = float(predictor.query.gain)
    space = AttentionSpace(predictor, world.embeddings, "ridge", tmp_path)
    forecast = sum(
        w * kernel_matrix @ fit.coefficients for w, (kernel_matrix, fit) in zip(stacked, members, strict=True)
    )
    np.testing.assert_allclose(space.queries[:, 0], gain * forecast, atol=4e-3)
    keys = space.keys(rows)
    np.testing.assert_allclose(keys[:, 0], gain * (held_out @ stacked), atol=4e-3)
    # The text's components are as long as the forecast and not read by attention.
    assert not keys[:, 1:].any()
    assert np.mean(np.sum(space.queries[rows, 1:] ** 2, axis=1)) == pytest.approx(np.var(keys[:, 0]), rel=0.01)


def test_a_regression_of_before_there_were_members_loads(world, tmp_path):
    rows = world.split.train[:60]
    predictor = fit_kernel_ridge(world.embeddings[rows], world.outcomes.take(rows), [32])
    predictor.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    inputs = weights["inputs.scale"]
    for adapter in ("query", "reference"):
        bandwidth = float(weights.pop(f"{adapter}.precision")) ** -0.5
        weights[f"{adapter}.coefficients"] = weights[f"{adapter}.coefficients"][0]
        weights[f"{adapter}.centres"] = weights[f"{adapter}.centres"] / bandwidth
        weights[f"{adapter}.basis"] = weights[f"{adapter}.basis"] * bandwidth
    weights["inputs.scale"] = inputs / bandwidth
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("blocks", "members")})
    )
    before, after = predictor, AttentionPredictor.load(tmp_path)
    x, rates = torch.from_numpy(world.embeddings), torch.from_numpy(world.outcomes.rates[rows, 0])
    torch.testing.assert_close(after(x, x[rows], rates), before(x, x[rows], rates), atol=1e-4, rtol=1e-3)


def test_visits_average_over_their_own_references():
    rng = np.random.default_rng(2)
    logits, rates = torch.from_numpy(rng.normal(size=(5, 7))), torch.from_numpy(rng.uniform(size=(7, 3)))
    rates[[0, 3], 1] = torch.nan
    rates[:, 2] = torch.nan
    found = average_measured(torch.softmax(logits, 1).float(), rates.float())
    kept = [1, 2, 4, 5, 6]
    torch.testing.assert_close(found[:, 0], (torch.softmax(logits, 1) @ rates[:, 0]).float())
    torch.testing.assert_close(found[:, 1], (torch.softmax(logits[:, kept], 1) @ rates[kept, 1]).float())
    assert found[:, 2].isnan().all()


def test_loss_by_hand_counts_what_was_measured():
    rates = torch.tensor([[1.0, torch.nan], [0.25, 0.5]])
    forecasts = torch.tensor([[0.8, 0.3], [0.5, torch.nan]])
    expected = -(np.log(0.8) + np.log(0.5)) / 2
    assert float(soft_loss(forecasts, rates)) == pytest.approx(expected, rel=1e-6)
    # The worst forecast has the steepest gradient: -1 / p, and p - r in the logits.
    worst = torch.tensor([[1e-6]], requires_grad=True)
    loss = soft_loss(worst, torch.ones(1, 1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(13.8155, rel=1e-5)
    assert float(worst.grad) == pytest.approx(-1e6, rel=1e-4)
    head = HEADS["group_logit_temperature"]()
    torch.testing.assert_close(visit_forecasts(head, forecasts[:, :1], rates[:, :1]), forecasts[:, :1])


def test_a_seed_decides_the_kernel_ridge_alone(world: World) -> None:
    found = []
    for other in (1, 2):
        torch.manual_seed(other)
        state = fit_kernel_ridge(world.embeddings[:60], world.outcomes.take(np.arange(60)), [32], seed=3).state_dict()
        found.append(state)
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
