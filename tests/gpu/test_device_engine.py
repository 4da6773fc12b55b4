"""The Transformers engine on the device: tokens, log-probabilities and speed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from app.engines import Sampling, Transformers
from app.engines.transformers.shared_cache import SLACK
from app.engines.transformers.step_graphs import Capture, Step, capture_on
from app.objective.packing import ScoredSequence, collate
from app.policy.adapters import causal_lm
from app.policy.model import Policy
from app.policy.scoring import completion_logprobs
from app.reporting import memory
from app.reporting.memory import DecoderShape
from datamodules.types import Completion, Prompt
from tests.gpu.conftest import Measured
from tests.gpu.shapes import DEVICE, large, mixed, on_gpu, peak, plain, seconds
from tests.support.policies import TINY
from tests.support.recorded_step import Recorder
from tests.support.scripted_conversations import ScriptedConversations, gap_of_turns

POLICY = Policy(str(TINY))
Groups = Sequence[tuple[Completion, ...]]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    tokenizer = POLICY.load_tokenizer()
    texts = [f"Spell this word backward: {word}\n" for word in ("cat", "house", "green", "planet", "sun", "window")]
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [Prompt(str(i), i, text, text, one, {}) for i, (text, one) in enumerate(zip(texts, ids, strict=True))]


def generate(
    model: PreTrainedModel,
    prompts: list[Prompt],
    context: AbstractContextManager[object],
    share: bool = True,
    temperature: float = 1.0,
    graphs: bool = True,
) -> Groups:
    engine = Transformers(share_prompts=share, cuda_graphs=graphs)
    engine.setup(model, POLICY.load_tokenizer())
    seeds = np.arange(len(prompts) * 4).reshape(-1, 4) * 7919
    sampling = Sampling(num_generations=4, max_completion_length=48, temperature=temperature)
    with context:
        return engine.generate(prompts, sampling, seeds)


def equal_share(found: Groups, expected: Groups) -> float:
    pairs = [
        (a.token_ids.tolist(), b.token_ids.tolist())
        for group, other in zip(found, expected, strict=True)
        for a, b in zip(group, other, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_are_those_of_float64_on_a_cpu(
    device: torch.device, prompts: list[Prompt], temperature: float
) -> None:
    right = generate(causal_lm(POLICY.load()).double(), prompts, plain(), share=False, temperature=temperature)
    model = causal_lm(POLICY.load()).to(device)
    for share in (True, False):
        assert equal_share(generate(model, prompts, plain(), share, temperature), right) >= 0.9


def test_log_probabilities_are_those_of_the_update(
    device: torch.device, prompts: list[Prompt], measured: Measured
) -> None:
    model = causal_lm(POLICY.load()).to(device)
    for name, autocast in (("float32", False), ("mixed", True)):
        groups = generate(model, prompts, mixed(device) if autocast else plain())
        scored = [
            ScoredSequence(prompt.token_ids, one.token_ids, one.logprobs, 0.0, 1.0)
            for prompt, group in zip(prompts, groups, strict=True)
            for one in group
        ]
        batch = collate(scored, device=device)
        with torch.no_grad(), mixed(device) if autocast else plain():
            gap = (completion_logprobs(model, batch, 1.0, with_entropy=False)[0] - batch.behaviour_logprobs).abs()
        measured(**{f"{name}_mean": float(gap.mean()), f"{name}_max": float(gap.max())})
        assert float(gap.mean()) < (1e-4 if name == "float32" else 0.05)
        assert float(gap.max()) < (1e-3 if name == "float32" else 1.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_turns_have_the_log_probabilities_of_a_forward_over_the_conversation(
    device: torch.device, prompts: list[Prompt], autocast: bool, measured: Measured
) -> None:
    """Contexts stay in the cache between turns, at the addresses that CUDA graphs know."""
    model = causal_lm(POLICY.load()).to(device)
    engine = Transformers(max_rows=12)
    engine.setup(model, POLICY.load_tokenizer())
    talks = ScriptedConversations(prompts, np.arange(len(prompts) * 4).reshape(-1, 4), turns=4, limit=24)
    with mixed(device) if autocast else plain():
        engine.converse(talks, Sampling(num_generations=1, max_completion_length=24))
        assert {len(talk.turns) for talk in talks.talks} == {1, 2, 3, 4}
        gap = gap_of_turns(model, talks)
    measured(**{f"turns_{'mixed' if autocast else 'float32'}_max": gap})
    assert gap < (1.0 if autocast else 1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_graphs_draw_the_same(
    device: torch.device, prompts: list[Prompt], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the operators of a step are recorded and repeated instead."""
    recorded: list[Capture] = []

    def noted(device: torch.device, model: PreTrainedModel) -> Capture:
        capture = capture_on(device, model) or Recorder()

        def once(step: Step) -> Step:
            recorded.append(capture)
            return capture(step)

        return once

    model = causal_lm(POLICY.load()).to(device)
    for updates in range(2):
        monkeypatch.setattr("app.engines.transformers.generation.capture_on", noted)
        found = generate(model, prompts, mixed(device) if autocast else plain())
        assert recorded, "no step was recorded"
        recorded.clear()
        monkeypatch.setattr("app.engines.transformers.generation.capture_on", capture_on)
        eager = generate(model, prompts, mixed(device) if autocast else plain(), graphs=False)
        assert equal_share(found, eager) >= (0.8 if autocast else 0.9), f"after {updates} updates"
        with torch.no_grad():  # the next generation must read the new weights
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("way", ["float32", "mixed", "mixed without CUDA graphs", "bfloat16 weights"])
def test_decoding_speed(device: torch.device, way: str, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing ends early: the time of a token step is the difference between long and short completions.
    monkeypatch.setattr("app.engines.transformers.generation.end_token_ids", lambda *_: np.zeros(0, dtype=np.int64))
    model = large(dtype=torch.bfloat16 if way == "bfloat16 weights" else torch.float32)
    engine = Transformers(cuda_graphs="without" not in way)
    engine.setup(model, POLICY.load_tokenizer())
    draw, groups = np.random.default_rng(0), 8 if on_gpu() else 2
    some = [
        Prompt(str(i), i, "", "", tuple(draw.integers(5, model.config.vocab_size, 128).tolist()), {})
        for i in range(groups)
    ]
    seeds = np.arange(groups * 8).reshape(groups, 8)

    def run(length: int) -> None:
        with mixed(device) if way.startswith("mixed") else plain():
            found = engine.generate(some, Sampling(num_generations=8, max_completion_length=length), seeds)
        assert {len(one.token_ids) for group in found for one in group} == {length}

    step = (seconds(lambda: run(40), 1) - seconds(lambda: run(8), 1)) / 32
    read = sum(one.numel() for one in model.parameters()) * (4 if way == "float32" else 2)
    measured(ms=1e3 * step, tokens_per_second=groups * 8 / step, weights_gb_per_second=read / step / 1e9)
    if DEVICE == "cuda":
        assert step < 0.1


def test_a_rollout_holds_what_describe_says(device: torch.device, measured: Measured) -> None:
    """Key-value cache and a decode step, or the prefill."""
    model = large() if on_gpu() else causal_lm(POLICY.load())
    shape, rows, length = DecoderShape.of(model), 64 if on_gpu() else 48, 256 if on_gpu() else 120
    engine = Transformers(max_rows=rows)
    engine.setup(model, POLICY.load_tokenizer())
    draw = np.random.default_rng(0)
    ids = draw.integers(5, shape.vocabulary, (16, 60))
    some = [Prompt(str(i), i, "", "", tuple(one.tolist()), {}) for i, one in enumerate(ids)]
    seeds = np.arange(64).reshape(16, 4)

    def run() -> None:
        engine.generate(some, Sampling(num_generations=4, max_completion_length=length), seeds)

    run()
    held, cache = peak(run), 4 * shape.cached * (rows * (length + SLACK) + 16 * 60)
    estimate = cache + memory.decode_workspace(shape, 4, rows, 60 + length, 12 * 60, cache)
    measured(peak_gib=held / 2**30, estimate=estimate / held)
    assert 0.7 < estimate / held < 1.4
