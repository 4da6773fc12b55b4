"""The arithmetic of the estimated step, by hand, and the table of the documentation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import Qwen2Config

from app.reporting.memory import DecoderShape
from tests.benchmarks import estimate
from tests.benchmarks.estimate import Counted, Machine, Work, moved_bytes, published, step, table
from tests.unit.test_packaging import ROOT

SHAPE = DecoderShape(
    layers=10, hidden=100, heads=2, queries=100, keys=50, head_dim=50, intermediate=200, vocabulary=1_000, tied=True,
    qk_norm=False, parameters=1_000_000, layer_parameters=90_000, root_parameters=100_000,
)  # fmt: skip
MACHINE = Machine(
    products=1e9, attention=1e8, memory=1e9, links=1e6, host=1e6, launch=1e-3, engine_step=0.01, sleep=2, push=3,
    score=0.5, between=4,
)  # fmt: skip
WORK = Work(
    sequences=40, group=4, completions=20, prompt=40, length=101, deviation=0, longest=200, max_rows=5,
    microbatch=1_000, workers=2, checkpoint_every=4,
)  # fmt: skip


def test_each_line_by_hand() -> None:
    found = {one.part: one.seconds for one in step(SHAPE, WORK, MACHINE, 2, Counted(20, 1_000, 50_000))}
    matrices = 100 * (2 * 100 + 2 * 50 + 3 * 200)  # of a layer: 90,000
    # 10 completions on each GPU, 5 at a time: 2 x 101 steps, and 99 more for the last.
    assert found["decoding: weights read"] == pytest.approx(301 * 2 * (10 * matrices + 100_000) / 1e9)
    # Keys and values of 10 layers x 2 x 50 in bfloat16, of 40 + 101 / 2 tokens for each of 1,010.
    assert found["decoding: cache read"] == pytest.approx(1_010 * 90.5 * 2_000 / 1e9)
    assert found["decoding: the rest of a step"] == pytest.approx(3.01)
    # 20 sequences of 100 read tokens and a quarter of a prompt of 40: 2,200 positions in 2.2 micro-batches.
    assert found["layers: matrix products"] == pytest.approx(3 * 2 * 900_000 * 2_200 / 1e9)
    # 2 products x 2 operations x 100 x 10 layers for each of 90.5 tokens and 2,020 targets, 3.5 times.
    assert found["layers: attention"] == pytest.approx(4 * 1_000 * 90.5 * 2_020 * 3.5 / 1e8)
    assert found["layers: small operators"] == pytest.approx(10 * (1_000 * 2_200 + 50_000 * 2.2) / 1e9)
    assert found["head: matrix products"] == pytest.approx(4 * 2 * 100_000 * 2_020 / 1e9)
    assert found["head: softmax"] == pytest.approx(2_020 * 1_000 * 68 / 1e9)
    # 2.2 x 300 launches take 0.66 s, less than the products.
    assert found["launches that the GPU waits for"] == 0
    assert found["rewards"] == pytest.approx(2.5)
    assert found["AdamW, gradients summed"] == pytest.approx(28e6 / 1e9 + 2 * 4e6 / 2 / 1e6)
    assert found["checkpoint"] == pytest.approx(12e6 / 1e6 / 4)
    assert [found[name] for name in ("vLLM sleeps and wakes", "weights to vLLM", "selection, exchange, logs")] == [
        4,
        3,
        4,
    ]
    assert len(found) == 15


def test_launches_count_where_the_gpu_waits() -> None:
    slow = replace(MACHINE, launch=1.0)
    found = {one.part: one.seconds for one in step(SHAPE, WORK, slow, 2, Counted(20, 1_000, 50_000))}
    busy = sum(seconds for part, seconds in found.items() if part.startswith(("layers", "head")))
    assert found["launches that the GPU waits for"] == pytest.approx(2.2 * 300 - busy)


def test_a_layer_again_costs_a_third_more_products() -> None:
    again = replace(WORK, checkpointing=True)
    parts = [
        {one.part: one.seconds for one in step(SHAPE, work, MACHINE, 2, Counted(20, 1_000, 50_000))}
        for work in (WORK, again)
    ]
    assert parts[1]["layers: matrix products"] == pytest.approx(parts[0]["layers: matrix products"] * 4 / 3)
    assert parts[1]["layers: attention"] == pytest.approx(parts[0]["layers: attention"] * 4.5 / 3.5)


def test_bytes_of_small_operators() -> None:
    """Twice the width, twice the bytes per position; those per micro-batch follow the weights, with its square."""

    def moved(scale: int) -> tuple[float, float]:
        config = Qwen2Config(
            hidden_size=64 * scale, intermediate_size=256 * scale, num_attention_heads=4 * scale,
            num_key_value_heads=2 * scale, max_position_embeddings=64,
        )  # fmt: skip
        return moved_bytes(config, (4, 12), checkpointing=False)

    (each, fixed), (twice, squared) = moved(1), moved(2)
    # A forward pass moves, by hand: norms 2 x 14 H, residuals 2 x 10 H, SwiGLU 10 I, the rotation and the values more
    # than 20 (q + k); the gradients at least as much.
    assert each > 2 * (48 * 64 + 10 * 256 + 20 * (64 + 32))
    assert twice == pytest.approx(2 * each, rel=0.05)
    # Weights: joined and cast (float32 read and written, again read, and written in bfloat16), gradients added.
    matrices = 64 * (2 * 64 + 2 * 32 + 3 * 256)
    assert fixed > (4 + 4 + 4 + 2) * matrices
    assert squared == pytest.approx(4 * fixed, rel=0.1)


def test_the_published_sizes() -> None:
    shape = published()
    assert (shape.layers, shape.vocabulary, shape.hidden) == (28, 151_936, 1_536)
    assert shape.layers * shape.layer_matrices == pytest.approx(1.31e9, rel=0.01)
    assert shape.cached * 2 == 28 * 1024  # bytes of a token in bfloat16


@pytest.mark.long
def test_the_documentation_shows_what_is_computed() -> None:
    page, shape, plain = (ROOT / "docs/gpu.md").read_text(), published(), estimate.counted(False)
    for gpus in (8, 1):
        assert table(list(step(shape, Work(), Machine(), gpus, plain))) in page
