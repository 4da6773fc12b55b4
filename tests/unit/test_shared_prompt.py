"""One row in which every prompt stands once, against each sequence run alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.objective.packing import ScoredSequence, collate, pack, plan_packs
from app.objective.shared_prompt import Blocks, plan_shared
from app.scoring import can_share_prompts, score

SIZES = {
    "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.5,
}  # fmt: skip


def qwen(**options: object) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **options)).double()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)).double()


@pytest.fixture(scope="module")
def sequences() -> list[ScoredSequence]:
    """Four prompts of 1 to 6 tokens with 1 to 4 completions of 1 to 9 tokens, not in the order of the prompts."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 13, length) for length in (3, 1, 6, 4)]
    made = [
        ScoredSequence(prompts[owner], rng.integers(0, 13, length), -3 * rng.random(length), rng.normal(), 0.1)
        for owner, length in [(2, 5), (0, 9), (1, 1), (0, 1), (2, 2), (0, 7), (3, 1), (2, 8), (2, 3)]
    ]
    return made


def test_layout_by_hand() -> None:
    batch = pack(
        [
            ScoredSequence([5, 6], [7, 8, 9], [-1.0, -2.0, -3.0], 1.0, 0.25),
            ScoredSequence((4,), [3], [-0.5], 2.0, 0.5),
            ScoredSequence(np.array([5, 6]), [1, 2], [-4.0, -5.0], -1.0, 0.75, replayed=True),
        ]
    )
    # Prompts 5 6 and 4, then 7 8 of the first completion and 1 of the third; what comes last predicts nothing.
    assert batch.input_ids.tolist() == [[5, 6, 4, 7, 8, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 2, 3, 2]]
    assert batch.targets.tolist() == [7, 8, 9, 3, 1, 2]
    assert batch.predictors.tolist() == [1, 3, 4, 2, 1, 5]
    assert batch.sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.advantages.tolist() == [1, 1, 1, 2, -1, -1]
    assert batch.replayed.tolist() == [False, False, False, False, True, True]
    assert (batch.real_tokens, batch.sequence_tokens, batch.padding_fraction) == (6, 11, 0)
    assert batch.layout is not None
    assert batch.layout.owner.tolist() == [0, 1, 0]
    assert batch.layout.mask[:, 0].int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 1, 0], [1, 0, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_blocks_give_back_what_they_pad() -> None:
    blocks = Blocks.of(np.array([2, 0, 3]))
    values = torch.arange(10.0, dtype=torch.float64).reshape(5, 1, 2).requires_grad_()
    padded = blocks.pad(values)
    assert padded.shape == (3, 1, 3, 2)
    assert padded[2, 0].tolist() == [[4, 5], [6, 7], [8, 9]]
    assert torch.equal(blocks.join(padded), values)
    assert torch.autograd.gradcheck(lambda x: blocks.join(blocks.pad(x) ** 2), values)


@pytest.mark.parametrize("make", [qwen, llama], ids=["qwen_gqa_tied", "llama"])
def test_logprobs_and_gradients_equal_those_of_sequences_alone(make: object, sequences: list[ScoredSequence]) -> None:
    model = make()  # type: ignore[operator]
    assert can_share_prompts(model)

    def run(batches: list) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        outputs = [score(model, batch, 0.7, with_entropy=True) for batch in batches]
        logprobs, entropies = (torch.cat(values) for values in zip(*outputs, strict=True))
        weights = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
        (weights * logprobs + 0.1 * entropies).sum().backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        return logprobs.detach(), gradient

    expected = run([collate([sequence]) for sequence in sequences])
    actual = run([pack(sequences)])
    assert expected[1].norm() > 1
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    # Qwen2 and Llama compute their norms in float32 whatever the weights are.
    assert (actual[1] - expected[1]).norm() <= 1e-7 * expected[1].norm()
    assert model.config._attn_implementation == "sdpa"


def test_which_models_can(sequences: list[ScoredSequence]) -> None:
    sliding = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not can_share_prompts(sliding)
    checkpointed = qwen()
    checkpointed.gradient_checkpointing_enable()
    assert not can_share_prompts(checkpointed)
    eager = qwen()
    eager.set_attn_implementation("eager")
    assert not can_share_prompts(eager)


def test_plan_by_hand() -> None:
    # Prompt 0: 4 + (2 + 1) = 7 tokens; prompt 1: 2 + (5 + 5) = 12, and longer completions, so it comes first.
    owner, prompts, completions = [0, 1, 0, 1], [4, 2], [3, 6, 2, 6]
    assert plan_shared(owner, prompts, completions, 19) == [[1, 3, 0, 2]]
    assert plan_shared(owner, prompts, completions, 18) == [[1, 3], [0, 2]]
    # 12 do not fit into 11: torn apart, and the prompt is read twice.
    assert plan_shared(owner, prompts, completions, 11) == [[1], [3], [0, 2]]
    assert plan_shared(owner, prompts, completions, 1) == [[1], [3], [0], [2]]
    assert plan_shared([], [], [], 5) == []
    with pytest.raises(ValueError, match="max_tokens=0"):
        plan_shared(owner, prompts, completions, 0)


def test_plan_covers_everything_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 99, rng.integers(5, 60)) for _ in range(40)]
    made = [
        ScoredSequence(prompt, np.zeros(length, dtype=int), np.zeros(length), 1.0, 1.0)
        for prompt in prompts
        for length in rng.integers(1, 90, 8)
    ]
    plan = plan_packs(made, 2048)
    assert sorted(index for part in plan for index in part) == list(range(320))
    sizes = [pack([made[index] for index in part]).real_tokens for part in plan]
    assert max(sizes) <= 2048
    whole = pack(made).real_tokens
    assert sum(sizes) == whole  # no prompt is read twice
    assert len(plan) <= 1.3 * np.ceil(whole / 2048)
