"""Random projections: what matrix they are, and the error of their inner products against theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import app.subsets.projection as module
from app.subsets.projection import NONZEROS, Rademacher, Sparse, projection
from datamodules.errors import UserError

KINDS = [Rademacher, Sparse]
SIZE, WIDTH = 700, 32


def matrix(kind, seed: int = 3) -> torch.Tensor:
    """Return `R [P, d]`, the projection of every unit vector."""
    return kind(SIZE, WIDTH, seed)(torch.eye(SIZE))


def test_the_dense_matrix_holds_signs():
    found = (matrix(Rademacher) * WIDTH**0.5).round(decimals=4)
    assert set(found.flatten().tolist()) == {-1.0, 1.0}
    # 22,400 fair signs: the mean is within 4 standard errors of 0, and no two rows agree throughout.
    assert abs(float(found.mean())) < 4 / found.numel() ** 0.5
    assert len(torch.unique(found, dim=0)) == SIZE


def test_the_sparse_matrix_has_one_sign_in_each_stretch_of_each_row():
    found = matrix(Sparse) * NONZEROS**0.5
    assert set(found.flatten().tolist()) == {-1.0, 0.0, 1.0}
    stretches = (found != 0).view(SIZE, NONZEROS, WIDTH // NONZEROS).sum(-1)
    assert bool((stretches == 1).all())
    columns = (found != 0).sum(0).float()
    assert float(columns.min()) > 0.5 * SIZE * NONZEROS / WIDTH


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_linear_and_does_not_depend_on_its_company(kind):
    rows = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0))
    together = kind(SIZE, WIDTH, 3)(rows)
    torch.testing.assert_close(together, rows @ matrix(kind), rtol=1e-5, atol=1e-5)
    alone = torch.cat([kind(SIZE, WIDTH, 3)(row[None]) for row in rows])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert not torch.equal(kind(SIZE, WIDTH, 4)(rows), together)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_drawn_apart(kind, monkeypatch):
    """Blocks of 8 turns or 64 rows: no block repeats another one's signs."""
    monkeypatch.setattr(module, "_DENSE_BLOCK", 64 * WIDTH)
    monkeypatch.setattr(module, "_SPARSE_BLOCK", 64)
    found = matrix(kind)
    blocks = [found[first : first + 64] for first in range(0, 640, 64)]
    assert all(not torch.equal(blocks[0], other) for other in blocks[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_err_as_johnson_and_lindenstrauss_say(kind):
    """Mean and variance over 1,000 matrices against `<x, y>` and the variance at the top of the module."""
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, SIZE)) * rng.exponential(size=SIZE)
    pair[1] += 0.5 * pair[0]
    x, y = pair
    rows = torch.from_numpy(pair).float()
    projected = [kind(SIZE, WIDTH, seed)(rows).double() for seed in range(1000)]
    products = np.array([float(a @ b) for a, b in projected])
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / WIDTH
    assert abs(products.mean() - x @ y) < 4 * (variance / len(products)) ** 0.5
    # Four standard errors of the variance of 1,000 normal draws are 18% of it.
    # Coordinates of one turn never meet, so that the sparse variance is a little smaller: by less than w / P.
    assert 0.82 - (WIDTH / NONZEROS / SIZE if kind is Sparse else 0) < products.var() / variance < 1.18


def test_invalid_projections_are_refused():
    with pytest.raises(UserError, match="did you mean 'sparse'"):
        projection("sparce", 10, 8, 0)
    with pytest.raises(UserError, match="multiple of 4"):
        projection("sparse", 10, 10, 0)
    rows = torch.randn(2, 10)
    assert torch.equal(projection("none", 10, 8, 0)(rows), rows)
