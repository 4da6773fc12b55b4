"""Conversations after their generation: what an environment said is read, has no loss, and is shown by its role."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from app.engines import Transformers
from app.objective.options import SurrogateOptions
from app.objective.packing import ScoredSequence, collate, pack, plan_microbatches, plan_packs
from app.objective.surrogate import policy_loss
from app.policy.scoring import completion_logprobs
from app.reporting.completions import shown_rows
from app.reporting.run_page import write_report
from app.reporting.validation import CONVERSATION_COUNTS, ValidationMetrics, mean_over_sets
from app.runs.folder import run_folder
from app.runs.record import METRICS
from app.update.metrics import batch_metrics
from app.update.minibatch import MiniBatch, advantages_of, minibatches
from app.update.reuse import Reuse
from callbacks import CompletionsLog, RolloutReplay, Rollouts, RunLedger, WeightSync
from datamodules.seeding import generator
from datamodules.types import Completion, Outcome, RolloutGroup, Turn
from tests.support.builders import completion, conversation, prompt
from tests.support.scripted_run import HALF, scripted_run

SAID, REPLIED = "assistant", "tool"
LAYOUTS = {"collate": (collate, lambda s, most: plan_microbatches([len(one) for one in s], most)),
           "pack": (pack, plan_packs)}  # fmt: skip


def groups() -> list[RolloutGroup]:
    """Two groups: replies in the middle, at the end, twice; none; a longer context; no own turn."""
    first = (
        conversation((SAID, [3, 4, 5]), (REPLIED, [6, 7, 8, 9]), (SAID, [10, 2])),
        conversation((SAID, [4]), (REPLIED, [5, 6, 11])),
        conversation((SAID, [9, 9]), (REPLIED, [3, 1]), (SAID, [7]), (REPLIED, [8]), (SAID, [1, 2])),
        completion((12, 5, 2)),
    )
    second = (
        conversation((SAID, [3]), (REPLIED, []), (SAID, [4, 12]), context=[1, 2, 8, 8, 3]),
        conversation((REPLIED, [6, 7]), (SAID, [8, 2]), context=[1, 2, 8, 8, 3]),
        conversation((REPLIED, [6, 7])),
    )
    return [
        RolloutGroup(prompt(index), its, rewards, rewards, {"exact": rewards}, "fresh", 0)
        for index, (its, rewards) in enumerate(
            ((first, np.array([1, 0, 0.25, 0.5], np.float32)), (second, np.array([0, 1, 0.5], np.float32)))
        )
    ]


def test_layouts_by_hand() -> None:
    made = [
        ScoredSequence(
            [5, 6], [7, 8, 9, 10], [-1.0, -2.0], 1.0, 0.25, [-3.0, -4.0], generated=np.array([True, False, False, True])
        ),
        ScoredSequence([5, 6], [3, 4], [-5.0], -1.0, 0.5, generated=np.array([True, False])),
    ]
    batch = collate(made)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10], [5, 6, 3, 4, 0, 0]]
    assert batch.predictors.tolist() == [1, 4, 7]  # 6 predicts 7, 9 predicts 10, and 6 predicts 3 in the row from 6 on
    shared = pack(made)
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert shared.predictors.tolist() == [1, 4, 1]
    for one in (batch, shared):
        assert one.targets.tolist() == [7, 10, 3]
        assert one.sequences.tolist() == [0, 0, 1]
        assert one.behaviour_logprobs.tolist() == [-1, -2, -5]
        assert one.old_logprobs.tolist() == [-3, -4, -5]
        assert one.advantages.tolist() == [1, 1, -1]
        assert one.weights.tolist() == [0.25, 0.25, 0.5]
        assert one.sequence_tokens == 6 + 4
    assert (batch.real_tokens, shared.real_tokens) == (10, 6)
    # Budgets count what is read: the prompt once, and both completions without their last token.
    assert plan_packs(made, 6) == [[0, 1]]
    assert plan_packs(made, 5) == [[0], [1]]


@pytest.mark.parametrize("lay_out", [collate, pack])
def test_wrong_marks_are_refused(lay_out: Any) -> None:
    with pytest.raises(ValueError, match="sequence 0: 0 of 2 tokens are generated, expected at least 1 of 2"):
        lay_out([ScoredSequence([1], [2, 3], [], 1.0, 1.0, generated=np.array([False, False]))])
    with pytest.raises(ValueError, match="sequence 0: 1 of 1 tokens are generated, expected at least 1 of 2"):
        lay_out([ScoredSequence([1], [2, 3], [-1.0], 1.0, 1.0, generated=np.array([True]))])
    with pytest.raises(ValueError, match="sequence 0: 2 behaviour_logprobs, expected 1, one per generated token"):
        lay_out([ScoredSequence([1], [2, 3], [-1.0, -1.0], 1.0, 1.0, generated=np.array([True, False]))])


def mini_batch(aggregation: Any) -> MiniBatch:
    its = groups()
    (part,) = minibatches(
        its, advantages_of(its, "group"), parts=1, generator=generator(0, "minibatches", 0), aggregation=aggregation,
        max_completion_length=10, keep_zero_advantage=True,
    )  # fmt: skip
    return part


def test_mini_batches_count_what_was_generated() -> None:
    part = mini_batch("sequence")
    # The conversation without a generated token is left out, and counts nowhere.
    assert [str(one) for one in part.ids] == ["p0[0]", "p0[1]", "p0[2]", "p0[3]", "p1[0]", "p1[1]"]
    assert [one.generated_tokens for one in part.sequences] == [5, 1, 5, 3, 3, 2]
    assert (part.tokens, part.skipped_tokens) == (19, 0)
    # A reply after the last turn predicts nothing.
    assert [len(one.completion_ids) for one in part.sequences] == [9, 1, 8, 3, 3, 4]
    assert [list(one.prompt_ids) for one in part.sequences] == [[1, 2, 3]] * 4 + [[1, 2, 8, 8, 3]] * 2
    assert all(np.isfinite(one.behaviour_logprobs).all() for one in part.sequences)
    # Mean over a group's conversations of the mean over their generated tokens.
    sizes = [4, 4, 4, 4, 3, 3]
    shares = np.array([7 / 2 / size for size in sizes])
    expected = shares / shares.sum() / (5, 1, 5, 3, 3, 2)
    np.testing.assert_allclose([one.weight for one in part.sequences], expected, rtol=1e-6)


def test_lengths_are_those_of_generated_tokens() -> None:
    metrics = batch_metrics(groups())
    assert metrics["completions/mean_length"] == pytest.approx((5 + 1 + 5 + 3 + 3 + 2 + 0) / 7)
    assert metrics["completions/max_length"] == 5
    # The baseline that weights rewards by length (OPO): generated tokens, 0 for the conversation that has none.
    first, second = advantages_of(groups(), "none", "optimal")
    correction = [(7 / 2 - 1) / (7 / 2) * size / (size - 1) for size in (4, 3)]
    np.testing.assert_allclose(first, correction[0] * (np.array([1, 0, 0.25, 0.5]) - 7.75 / 14), atol=1e-6)
    np.testing.assert_allclose(second, correction[1] * (np.array([0, 1, 0.5]) - 2 / 5), atol=1e-6)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


def gradient(model: Qwen2ForCausalLM) -> Tensor:
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def by_hand(
    model: Qwen2ForCausalLM, made: list[ScoredSequence], own: list[Completion], old: list[np.ndarray], only: bool = True
) -> Tensor:
    """The gradient of `-sum w min(r A, clip(r) A)`, `r = exp(log pi - log mu)`, over the generated tokens.

    `old` are log mu of every completion token, and of all of them with `only` false. One plain forward pass of each
    whole conversation.
    """
    model.zero_grad()
    for one, whole, mu in zip(made, own, old, strict=True):
        ids = torch.tensor([*one.prompt_ids, *whole.token_ids])
        table = model(ids[None]).logits[0].log_softmax(-1)
        for place, marked in enumerate(whole.generated):
            if not marked and only:
                continue
            position = len(one.prompt_ids) + place
            logprob = table[position - 1, ids[position]]
            ratio = float((logprob.detach() - float(mu[place])).exp())
            lead, weight = float(np.float32(one.advantage)), float(np.float32(one.weight))
            clipped = ratio > 1.2 if lead > 0 else ratio < 0.8
            if not clipped:
                (-weight * lead * ratio * logprob).backward(retain_graph=True)
    return gradient(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_by_hand(model: Qwen2ForCausalLM, layout: str) -> None:
    """In micro-batches of whole conversations, with ratios on both sides of the clip."""
    lay_out, plan = LAYOUTS[layout]
    own = [one for group in groups() for one in group.completions if one.generated_tokens]
    rng, made, old = np.random.default_rng(0), [], []
    for one, whole in zip(mini_batch("token").sequences, own, strict=True):
        ids = torch.tensor([*one.prompt_ids, *whole.token_ids])
        with torch.no_grad():
            table = model(ids[None]).logits[0].log_softmax(-1)[len(one.prompt_ids) - 1 : -1]
        now = table.gather(1, torch.tensor(whole.token_ids[:, None].astype(np.int64)))[:, 0].numpy()
        mu = (now + rng.normal(0, 0.3, len(now))).astype(np.float32)
        old.append(mu)
        made.append(ScoredSequence(one.prompt_ids, one.completion_ids, mu[whole.generated], one.advantage, one.weight,
                                   group=one.group, generated=one.generated))  # fmt: skip
    expected = by_hand(model, made, own, old)
    model.zero_grad()
    parts = plan(made, 24)
    assert len(parts) > 1
    for rows in parts:
        packed = lay_out([made[row] for row in rows])
        logprobs, entropy = completion_logprobs(model, packed, 1.0, with_entropy=True)
        policy_loss(
            logprobs, packed.behaviour_logprobs, packed.advantages, packed.weights, SurrogateOptions(),
            old_logprobs=packed.old_logprobs, sequences=packed.sequences, entropy=entropy,
        ).loss.backward()  # fmt: skip
    found = gradient(model)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    # What the test would see of a loss on the environment's tokens.
    masked_nothing = by_hand(model, made, own, old, only=False)
    assert (masked_nothing - expected).norm() > 0.1 * expected.norm()


def talking(one: Completion, context: Sequence[int]) -> Completion:
    """Put the reply of a tool after the first token of a completion."""
    first, reply, rest = one.token_ids[:1], np.array([6, 7], np.int32), one.token_ids[1:]
    nothing = np.full(2, np.nan, np.float32)
    said = [{"role": "assistant", "content": "f(1)"}], [{"role": "tool", "content": "<2>"}]
    return dataclasses.replace(
        one,
        token_ids=np.concatenate([first, reply, rest]),
        logprobs=np.concatenate([one.logprobs[:1], nothing, one.logprobs[1:]]),
        turns=(Turn(True, 1, said[0]), Turn(False, 2, said[1]), Turn(True, len(rest), said[0])),
        context=np.array([*context, 9], np.int32),
        outcome=Outcome(calls=2, failed_calls=1),
    )


def test_a_run_trains_replays_counts_and_shows_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Transformers.generate

    def generate_turns(self: Any, prompts: Any, *given: Any) -> Any:
        found = generate(self, prompts, *given)
        return [tuple(talking(one, asked.token_ids) for one in its) for asked, its in zip(prompts, found, strict=True)]

    monkeypatch.setattr(Transformers, "generate", generate_turns)
    callbacks = [WeightSync(), Rollouts(), RolloutReplay(), CompletionsLog(every=1), RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, [HALF] * 12, callbacks, steps=3, mini_batches=2, reuse=Reuse(2, None))
    assert any(step.metrics["replay/fraction"] for step in run.steps)
    tokens, folder = 0, run_folder(run.trainer)
    for number, step in enumerate(run.steps):
        unknown = {name for name, value in step.metrics.items() if not np.isfinite(value)}
        assert unknown <= {"selection/uniform_informative_measured", "updates/reuse_z_score"}, "measured of nothing"
        assert step.metrics["grad_norm"] > 0
        assert step.metrics["environment/turns"] == step.metrics["tools/call_frequency"] == 2
        assert (step.metrics["tools/failure_frequency"], step.metrics["environment/failed"]) == (0.5, 0)
        fresh = [one for group in step.groups if group.source == "fresh" for one in group.completions]
        tokens += sum(len(one.token_ids) - 2 for one in fresh)
        assert step.metrics["num_tokens"] == tokens
        rows = pq.read_table(folder / "completions" / f"step_{number:08d}.parquet").to_pylist()
        own = [one for group in step.groups for one in group.completions]
        for row, one in zip(rows, own, strict=True):
            assert [message["role"] for message in json.loads(row["turns"])] == ["assistant", "tool", "assistant"]
            assert row["completion_tokens"] == len(one.token_ids) - 2
            assert row["context"] == run.module.tokenizer.decode(one.context.tolist())
    (shown, *_) = shown_rows(rows, 1)
    assert shown["completion"] == "Assistant: f(1)\n\nTool: <2>\n\nAssistant: f(1)"
    assert shown["prompt"] == rows[0]["context"]
    (folder / METRICS).write_text('{"step": 0, "reward": 0.5}\n')
    assert "Assistant: f(1)\n\nTool: &lt;2&gt;\n\nAssistant: f(1)" in write_report(folder).read_text()


def test_validation_has_the_metrics_of_conversations_by_set() -> None:
    """Worked by hand: two sets, one of them in two batches, and one whose completions are single turns."""
    sets = {name: ValidationMetrics([1], generations=2) for name in ("val/a", "val/b")}
    for name, counts in (("val/a", (4, 6, 1, 3, 1)), ("val/a", (2, 6, 0, 3, 2)), ("val/b", (2, 2, 1, 0, 0))):
        sets[name].update([], defaultdict(float, zip(CONVERSATION_COUNTS, counts, strict=True)))
    found = {name: one.named(name) for name, one in sets.items()}
    assert found["val/a"].items() >= {
        "val/a/environment/turns": 2.0, "val/a/environment/failed": 1.0, "val/a/tools/call_frequency": 1.0,
        "val/a/tools/failure_frequency": 0.5,
    }.items()  # fmt: skip
    both = mean_over_sets("val", found)
    assert both["val/environment/turns"] == 1.5  # of 2 and 1
    assert both["val/environment/failed"] == 2.0  # conversations of both
    assert both["val/tools/failure_frequency"] == 0.25
    sets["val/a"].reset()
    sets["val/a"].update([], defaultdict(float, {"rewards/completions": 4.0}))
    assert not [name for name in sets["val/a"].named("val/a") if "environment" in name or "tools" in name]
