"""Draws compared with scipy's chi-square test and a brute-force temperature, top-k and top-p."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from app.engines.base import Sampling
from app.engines.transformers.sampler import BLOCK, draw, uniforms


def brute_force(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the distribution `[V]` in float64, by sorting."""
    p = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


def test_uniforms_match_scalar_splitmix64() -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    seeds, positions = np.array([0, 1, 2**63 - 1]), np.array([0, 7, 3])
    expected = [
        (mix((mix(s) + (p + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
        for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(uniforms(seeds, positions), expected)


def test_uniforms_are_uniform_and_uncorrelated_over_small_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    u = uniforms(seeds.ravel(), positions.ravel())
    assert kstest(u, "uniform").pvalue > 1e-3
    grid = u.reshape(200, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 2 * BLOCK + 3, 1500])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=1.5, top_k=6, top_p=0.7),
        Sampling(temperature=4.0, top_p=0.999),  # more than the first candidates
    ],
)
def test_token_and_logprob_against_brute_force(vocabulary: int, sampling: Sampling) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    u = np.linspace(0, 1 - 1e-9, 300)
    for row in range(3):
        p = brute_force(logits[row].numpy(), sampling)
        tokens, logprobs = draw(logits[row].expand(300, -1), torch.from_numpy(u), sampling)
        assert (p[tokens.numpy()] > 0).all()
        np.testing.assert_allclose(logprobs.numpy(), np.log(p[tokens.numpy()]), atol=2e-5)
        edges = np.concatenate([[0], np.cumsum(p)])  # u falls into its token's interval, up to float32
        assert (edges[tokens.numpy()] - 1e-6 <= u).all()
        assert (u <= edges[tokens.numpy() + 1] + 1e-6).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=8, top_p=0.9)])
def test_frequencies(sampling: Sampling) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    N = 40_000
    u = torch.from_numpy(uniforms(np.arange(N), np.zeros(N, dtype=np.int64)))
    counts = np.bincount(draw(logits.expand(N, -1), u, sampling)[0].numpy(), minlength=12)
    p = brute_force(logits.numpy(), sampling)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], N * p[p > 0]).pvalue > 1e-3


def test_ties_are_all_kept_wherever_they_stand() -> None:
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, -1.0]])
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.3)):
        tokens, logprobs = draw(logits.expand(50, -1), u, sampling)
        assert set(tokens.tolist()) == {0, 2, 3}
        np.testing.assert_allclose(logprobs.numpy(), -np.log(3), rtol=1e-6)


def test_greedy_takes_the_best_with_certainty_and_nan_shows() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, float("nan"), 1.0]])
    u = torch.full((2,), 0.999, dtype=torch.float64)
    tokens, logprobs = draw(logits, u, Sampling(temperature=0))
    assert tokens[0] == 1
    assert logprobs[0] == 0
    assert logprobs[1].isnan()
    assert draw(logits, u, Sampling())[1].isnan().tolist() == [False, True]
    assert draw(logits, u, Sampling(top_k=2, top_p=0.5))[1].isnan().tolist() == [False, True]
