"""vLLM in this process with a real model, SmolLM2-135M: log-probabilities, speed and duration of a push."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from app.engines import RolloutEngine, Sampling, Transformers, Vllm
from app.policy.adapters import causal_lm
from app.policy.model import Policy
from app.policy.weights import plain_weights
from datamodules.types import Completion, Prompt
from tests.support.smollm import PACKAGE, convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: `make test-vllm`")
        for name in ("vllm", PACKAGE, "gguf")
    ),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy(str(convert(tmp_path_factory.mktemp("models") / "smollm2")))


@pytest.fixture(scope="module")
def model(policy: Policy) -> PreTrainedModel:
    return causal_lm(policy.load())


@pytest.fixture(scope="module")
def engine(policy: Policy, model: PreTrainedModel) -> Iterator[Vllm]:
    made = Vllm(max_model_len=1024, cpu_cache_gib=2)
    made.setup(model, policy.load_tokenizer())
    made.push(plain_weights(model), 0)
    yield made
    made.close()


def questions(policy: Policy, lengths: np.ndarray) -> list[Prompt]:
    """Return prompts of prose, so that completions are neither certain nor noise."""
    text = Path(__file__).parents[2].joinpath("README.md").read_text()
    ids = policy.load_tokenizer()(text)["input_ids"]
    parts = [tuple(ids[i * 37 : i * 37 + length]) for i, length in enumerate(lengths.tolist())]
    return [Prompt(f"q{i}", i, "", "", part, {}) for i, part in enumerate(parts)]


def trainer_logprobs(model: PreTrainedModel, prompt: Prompt, completion: Completion) -> torch.Tensor:
    T = len(completion.token_ids)
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    return model(ids).logits[0, -T - 1 : -1].log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]


def test_logprobs_are_the_trainers_after_every_one_of_20_updates(
    policy: Policy, model: PreTrainedModel, engine: Vllm
) -> None:
    batch, sampling = questions(policy, np.array([70, 97])), Sampling(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gaps, moved = [], 0.0
    groups = engine.generate(batch, sampling, np.arange(4).reshape(2, 2))
    for step in range(1, 21):
        optimizer.zero_grad()
        pairs = [(prompt, one) for prompt, group in zip(batch, groups, strict=True) for one in group]
        for sign, (prompt, one) in zip((1, -1, 1, -1), pairs, strict=True):
            (sign * trainer_logprobs(model, prompt, one).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        engine.push(plain_weights(model), step)
        # The same prompts again: without a reset, all but their last tokens would come from the prefix cache.
        groups = engine.generate(batch, sampling, np.arange(4).reshape(2, 2) + 4 * step)
        with torch.no_grad():
            found = [
                (trainer_logprobs(model, prompt, one) - torch.from_numpy(one.logprobs)).abs().max()
                for prompt, group in zip(batch, groups, strict=True)
                for one in group
            ]
            old = trainer_logprobs(model, *pairs[0]) - torch.from_numpy(pairs[0][1].logprobs)
        gaps.append(float(max(found)))
        moved = max(moved, float(old.abs().max()))
    print(f"\nlargest difference of each update: {np.array(gaps)}, an update moves a log-probability by {moved:.2f}")
    assert max(gaps) < 1e-3
    assert moved > 0.05


def timed(engine: RolloutEngine, batch: list[Prompt], seed: int) -> float:
    """Return the completion tokens per second of 16 prompts x 8 completions x 64 tokens."""
    start = time.perf_counter()
    groups = engine.generate(batch, Sampling(8, 64), np.arange(128).reshape(16, 8) + seed)
    return sum(len(one.token_ids) for group in groups for one in group) / (time.perf_counter() - start)


@pytest.mark.timing
def test_it_generates_as_fast_as_the_policy_itself(policy: Policy, model: PreTrainedModel, engine: Vllm) -> None:
    batch = questions(policy, np.linspace(60, 140, 16).astype(int))
    plain = Transformers()
    plain.setup(model, policy.load_tokenizer())
    start = time.perf_counter()
    engine.push(plain_weights(model), 21)
    push = time.perf_counter() - start
    timed(engine, batch, seed=0)
    pairs = [(timed(engine, batch, seed), timed(plain, batch, seed)) for seed in (1000, 2000, 3000)]
    print(f"\npush {push:.2f} s; tokens/s of vLLM and of transformers: {np.round(pairs, 1).tolist()}")
    # Both are bound by the same matrix products.
    assert np.median([ours / theirs for ours, theirs in pairs]) > 0.85
