"""The loss and its gradient equal those of TRL's own GRPOTrainer on the same tensors, for every loss that both have.

TRL's trainer is built on a two-layer model and its `_compute_loss` called with completions of unequal lengths; ours
goes from the same completions through `packing`, `scoring` and `policy_loss`, in micro-batches of its own. Float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from app.objective import advantages as ours
from app.objective.options import SurrogateOptions
from app.objective.packing import ScoredSequence, collate, plan_microbatches
from app.objective.ratios import Aggregation, token_weights
from app.objective.surrogate import policy_loss
from app.policy.scoring import completion_logprobs
from app.rewards import SoftOverlong
from app.update.minibatch import advantages_of, minibatches
from datamodules.seeding import generator
from datamodules.types import Completion, RolloutGroup
from tests.support.builders import prompt

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: dev)")

TOKENIZER = Path(__file__).parents[2] / "configs" / "tiny_policy"
LENGTHS = [8, 3, 5, 1, 7, 4]
LIMIT = 8
PROMPT = 5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double()


@dataclass(frozen=True)
class Tokens:
    """The input of both implementations: padded `[N, L]`, with advantages `[N]`; `generated` is 0 for tools' tokens."""

    prompt_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    generated: Tensor
    old: Tensor
    behaviour: Tensor
    reference: Tensor
    advantages: Tensor


@pytest.fixture(scope="module")
def tokens(model: Qwen2ForCausalLM) -> Tokens:
    """Three groups of two; the second has no advantage. Ratios are log-normal with sigma 0.3 around 1."""
    draw = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), LIMIT)
    prompt_ids = torch.randint(3, model.config.vocab_size, (len(LENGTHS), PROMPT), generator=draw)
    completion_ids = torch.randint(3, model.config.vocab_size, shape, generator=draw)
    with torch.no_grad():
        logits = model(torch.cat([prompt_ids, completion_ids], dim=1)).logits[:, PROMPT - 1 : -1]
    now = logits.log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)

    def near(center: Tensor, sigma: float) -> Tensor:
        moved = center + sigma * torch.randn(shape, generator=draw, dtype=torch.float64)
        return moved.float().double()  # what a stored float32 log-probability can be

    old = near(now, 0.3)
    return Tokens(
        prompt_ids,
        completion_ids,
        (torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]).long(),
        torch.ones(shape, dtype=torch.long),
        old,
        near(old, 0.6),
        near(now, 0.4),
        torch.tensor([0.75, -1.25, 0.0, 0.0, -0.5, 1.5], dtype=torch.float64),
    )


def gradients(model: Qwen2ForCausalLM) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def theirs(
    model: Qwen2ForCausalLM, tokenizer: Any, tokens: Tokens, folder: Path, importance: Tensor | None, **config: Any
) -> tuple[float, Tensor]:
    """Loss and gradient by TRL. Its `beta` is set afterwards: building would look for a reference model by name."""
    trainer = trainer_of(copy.deepcopy(model), tokenizer, folder, [no_reward], **{**config, "beta": 0.0})
    trainer.beta = config.get("beta", 0.0)
    trainer.use_vllm = importance is not None
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": tokens.prompt_ids,
            "prompt_mask": torch.ones_like(tokens.prompt_ids),
            "completion_ids": tokens.completion_ids,
            "completion_mask": tokens.mask,
            "advantages": tokens.advantages,
            "old_per_token_logps": tokens.old,
            "ref_per_token_logps": tokens.reference,
            "importance_sampling_ratio": importance,
            "num_items_in_batch": (tokens.mask * tokens.generated).sum(),
            **({} if tokens.generated.all() else {"tool_mask": tokens.generated}),
        },
    )
    loss.backward()
    return float(loss.detach()), gradients(trainer.model)


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def trainer_of(model: Any, tokenizer: Any, folder: Path, rewards: list[Any], **config: Any) -> Any:
    from datasets import Dataset

    options = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=len(LENGTHS), num_generations=2, max_completion_length=LIMIT, seed=3, **config,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "1+2="}]),
        processing_class=tokenizer,
    )


def mine(
    model: Qwen2ForCausalLM, tokens: Tokens, options: SurrogateOptions, aggregation: Aggregation, on_policy: bool = True
) -> tuple[float, Tensor]:
    """Loss and gradient by the project, in micro-batches of at most 26 tokens."""
    policy = copy.deepcopy(model)
    marks = [tokens.generated[row, :length].bool() for row, length in enumerate(LENGTHS)]
    lengths = torch.stack([its.sum() for its in marks])
    weights = token_weights(lengths, aggregation, max_completion_length=LIMIT).tolist()
    sequences = [
        ScoredSequence(
            tokens.prompt_ids[row].numpy(),
            tokens.completion_ids[row, :length].numpy(),
            (tokens.old if on_policy else tokens.behaviour)[row, :length][its].numpy(),
            float(tokens.advantages[row]),
            weights[row],
            tokens.old[row, :length][its].numpy(),
            generated=its.numpy(),
        )
        for row, (length, its) in enumerate(zip(LENGTHS, marks, strict=True))
    ]
    total = 0.0
    plan = plan_microbatches([len(sequence) for sequence in sequences], 26)
    assert len(plan) > 1
    for rows in plan:
        packed = collate([sequences[row] for row in rows])
        logprobs, entropy = completion_logprobs(policy, packed, 1.0, with_entropy=True)
        reference = torch.cat([tokens.reference[row, : LENGTHS[row]][marks[row]] for row in rows])
        loss = policy_loss(
            logprobs, packed.behaviour_logprobs, packed.advantages, packed.weights, options,
            old_logprobs=packed.old_logprobs, sequences=packed.sequences, entropy=entropy, reference_logprobs=reference,
        ).loss  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    return total, gradients(policy)


def assert_same(left: tuple[float, Tensor], right: tuple[float, Tensor]) -> None:
    assert left[0] == pytest.approx(right[0], rel=TOLERANCE)
    assert right[1].norm() > 1e-3
    assert (left[1] - right[1]).norm() <= TOLERANCE * right[1].norm()


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], Aggregation]] = {
    # name: (TRL's configuration, ours, our aggregation)
    "grpo": ({"loss_type": "grpo"}, {}, "sequence"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}, "constant"),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"epsilon_high": 0.28}, "token"),
    "bnpo": ({"loss_type": "bnpo"}, {}, "token"),
    # TRL's epsilon_high is CISPO's cap itself, not its distance from 1; the second cap is one that ratios reach.
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"form": "cispo"}, "token"),
    "cispo_capped": ({"loss_type": "cispo", "epsilon_high": 1.1}, {"form": "cispo", "cispo_cap": 1.1}, "token"),
    "sapo": ({"loss_type": "sapo"}, {"form": "sapo"}, "sequence"),
    "two_sided": ({"loss_type": "grpo", "delta": 1.25}, {"dual_clip": 1.25}, "sequence"),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
        {"ratio_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
        "sequence",
    ),
    "gspo_token_mean": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}, "token"
    ),
    "sapo_sequence": (
        {"loss_type": "sapo", "importance_sampling_level": "sequence"},
        {"form": "sapo", "ratio_level": "sequence"},
        "sequence",
    ),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
        {"ratio_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
        "sequence_sum",
    ),
    "vespo": ({"loss_type": "vespo"}, {"form": "vespo"}, "token"),
    "off_policy_mask": (
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05}, {"off_policy_mask_threshold": 0.05}, "sequence"
    ),
    "cispo_sequence": (
        {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.05},
        {"form": "cispo", "ratio_level": "sequence", "cispo_cap": 1.05},
        "token",
    ),
}  # fmt: skip
KL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no_kl": ({}, {}),
    # TRL corrects unless told not to, ours the other way round (GRPO as printed).
    "kl": ({"beta": 0.3, "use_bias_correction_kl": False}, {"beta": 0.3}),
    "kl_corrected": ({"beta": 0.3}, {"beta": 0.3, "kl_corrected": True}),
}


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(model: Any, tokenizer: Any, tokens: Tokens, tmp_path: Path, name: str, kl: str) -> None:
    config, options, aggregation = LOSSES[name]
    expected = theirs(model, tokenizer, tokens, tmp_path, None, **config, **KL[kl][0])
    assert_same(mine(model, tokens, SurrogateOptions(**options, **KL[kl][1]), aggregation), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_conversations(model: Any, tokenizer: Any, tokens: Tokens, tmp_path: Path, name: str) -> None:
    """With replies of tools in the middle and at the end, which TRL leaves out by its `tool_mask`."""
    generated = torch.ones_like(tokens.generated)
    generated[0, 2:5] = generated[2, 1:3] = generated[4, 5:] = generated[5, 3:] = 0
    config, options, aggregation = LOSSES[name]
    talked = replace(tokens, generated=generated)
    expected = theirs(model, tokenizer, talked, tmp_path, None, **config, **KL["kl"][0])
    chosen = SurrogateOptions(**options, **KL["kl"][1])
    assert_same(mine(model, talked, chosen, aggregation), expected)
    whole = mine(model, tokens, chosen, aggregation)
    assert (whole[1] - expected[1]).norm() > 0.05 * expected[1].norm()


@pytest.mark.parametrize("name", ["dapo", "cispo_capped", "sapo", "gspo_token_mean", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_correction(
    model: Any, tokenizer: Any, tokens: Tokens, tmp_path: Path, name: str, level: Any, mode: Any
) -> None:
    """TRL computes `pi_old / mu` while it generates; here it is written out and handed to its loss."""
    config, options, aggregation = LOSSES[name]
    log_ratio = (tokens.old - tokens.behaviour) * tokens.mask
    ratio = (log_ratio if level == "token" else log_ratio.sum(1, keepdim=True)).exp()
    bounded = ratio.clamp(max=1.5) if mode == "truncate" else ratio * (ratio <= 1.5)
    assert 0 < int((ratio > 1.5).sum()) < ratio.numel()
    expected = theirs(model, tokenizer, tokens, tmp_path, bounded, **config)
    chosen = SurrogateOptions(**options, importance_cap=1.5, importance_level=level, importance_mode=mode)
    assert_same(mine(model, tokens, chosen, aggregation, on_policy=False), expected)


def test_entropy_bonus(model: Any, tokenizer: Any, tokens: Tokens, tmp_path: Path) -> None:
    """On purpose: TRL's bonus is the mean over tokens for every loss; ours is aggregated like the loss.

    So they are equal with the token mean, and otherwise differ by the difference of the two means of the entropy.
    """
    options = SurrogateOptions(entropy_coef=0.2)
    expected = theirs(model, tokenizer, tokens, tmp_path, None, loss_type="dapo", entropy_coef=0.2)
    assert_same(mine(model, tokens, options, "token"), expected)
    expected = theirs(model, tokenizer, tokens, tmp_path, None, loss_type="grpo", entropy_coef=0.2)
    bonus = {
        aggregation: [
            a - b
            for a, b in zip(
                mine(model, tokens, options, aggregation),
                mine(model, tokens, SurrogateOptions(), aggregation),
                strict=True,
            )
        ]
        for aggregation in ("token", "sequence")
    }
    found = mine(model, tokens, options, "sequence")
    swapped = [f - s + t for f, s, t in zip(found, bonus["sequence"], bonus["token"], strict=True)]
    assert_same((swapped[0], swapped[1]), expected)  # type: ignore[arg-type]
    assert (found[1] - expected[1]).norm() > 1e-3 * expected[1].norm()


def test_several_micro_batches(model: Any, tokenizer: Any, tokens: Tokens, tmp_path: Path) -> None:
    """On purpose: TRL's grpo and bnpo average over the local batch and then over local batches; ours over all.

    For the mean over sequences that is the same with equal halves; for bnpo's mean over tokens it is not.
    """

    def halves(**config: Any) -> tuple[float, Tensor]:
        found = [
            theirs(model, tokenizer, half(tokens, rows), tmp_path, None, **config)
            for rows in (slice(0, 3), slice(3, 6))
        ]
        return (found[0][0] + found[1][0]) / 2, (found[0][1] + found[1][1]) / 2

    assert_same(mine(model, tokens, SurrogateOptions(), "sequence"), halves(loss_type="grpo"))
    whole, split = mine(model, tokens, SurrogateOptions(), "token"), halves(loss_type="bnpo")
    assert (whole[1] - split[1]).norm() > 0.01 * whole[1].norm()


def half(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(**{name: value[rows] for name, value in vars(tokens).items()})


# ---- advantages, through TRL's own generation and scoring


def by_length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [len(ids) / 3 for ids in completion_ids]


def by_first_token(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [0.01 * (ids[0] % 3) for ids in completion_ids]


def sometimes(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [None if ids[0] % 4 == 0 else float(ids[-1] % 2) for ids in completion_ids]


@pytest.fixture
def same_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """On purpose: TRL adds 1e-4 to a standard deviation, we 1e-6 as verl does: small rewards keep their size."""
    monkeypatch.setattr(ours, "STD_EPSILON", 1e-4)


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "batch"),
    ],
)
@pytest.mark.usefixtures("same_epsilon")
def test_advantages(model: Any, tokenizer: Any, tmp_path: Path, aggregation: str, scale: Any) -> None:
    """12 completions in 3 groups of 4, three weighted rewards; one does not always apply."""
    rewards, weights = [by_length, by_first_token, sometimes], [1.0, 0.5, 2.0]
    trainer = trainer_of(
        copy.deepcopy(model).float(), tokenizer, tmp_path, rewards, reward_weights=weights, scale_rewards=scale,
        multi_objective_aggregation=aggregation, generation_batch_size=12, num_generations_eval=4,
    )  # fmt: skip
    trainer.num_generations = 4
    trainer.model.train()
    made = trainer._generate_and_score_completions([{"prompt": f"{row // 4}+1="} for row in range(12)])
    lengths = made["completion_mask"].sum(1).tolist()
    ids = [row[:length] for row, length in zip(made["completion_ids"].tolist(), lengths, strict=True)]
    groups = [group_of(first // 4, ids[first : first + 4], rewards, weights) for first in (0, 4, 8)]
    apart = dict(zip(groups[0].components, weights, strict=True)) if aggregation == "normalize_then_sum" else None
    found = np.concatenate(advantages_of(groups, scale, decoupled=apart))
    expected = made["advantages"].numpy()
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def group_of(index: int, ids: list[list[int]], rewards: list[Any], weights: list[float]) -> RolloutGroup:
    scores = np.array([[np.nan if s is None else s for s in reward(ids)] for reward in rewards], dtype=np.float32)
    total = np.nansum(scores * np.array(weights, dtype=np.float32)[:, None], axis=0)
    completions = tuple(
        Completion(np.array(one, dtype=np.int32), np.full(len(one), -1.0, np.float32), "length", 0, "") for one in ids
    )
    components = {reward.__name__: scores[row] for row, reward in enumerate(rewards)}
    return RolloutGroup(prompt(index), completions, total, total, components, "fresh", 0)


def test_truncated_completions(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's count of tokens for the mean, with completions at the limit masked, is ours.

    On purpose: under the mean over sequences TRL divides by all sequences, ours by those that count.
    """
    trainer = trainer_of(
        copy.deepcopy(model).float(), tokenizer, tmp_path, [by_length], mask_truncated_completions=True
    )
    trainer.model.train()
    made = trainer._generate_and_score_completions([{"prompt": f"{row // 2}+1="} for row in range(6)])
    raw = made["completion_ids"].tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else None for row in raw]
    completions = [
        Completion(np.array(row[:end]), np.full(end or LIMIT, -1.0, np.float32), "stop" if end else "length", 0, "")
        for row, end in zip(raw, ends, strict=True)
    ]
    assert None in ends
    rewards = np.array([0.0, 1.0], dtype=np.float32)
    groups = [
        RolloutGroup(prompt(i), tuple(completions[2 * i : 2 * i + 2]), rewards, rewards, {}, "fresh", 0)
        for i in range(3)
    ]
    (part,) = minibatches(
        groups, advantages_of(groups, "group"), parts=1, generator=generator(0, "minibatches", 0),
        aggregation="token", max_completion_length=LIMIT, keep_zero_advantage=False, mask_truncated=True,
    )  # fmt: skip
    assert part.tokens == int(made["num_items_in_batch"])


def test_soft_overlong_penalty() -> None:
    from trl.rewards import get_soft_overlong_punishment

    ids = [[7] * length for length in (1, 12, 13, 16, 19, 20, 25)]
    expected = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)(completion_ids=ids)
    assert SoftOverlong(20, 8)([], [], ids) == pytest.approx(expected)
    assert expected == pytest.approx([0, 0, -1 / 8, -4 / 8, -7 / 8, -1, -1])
