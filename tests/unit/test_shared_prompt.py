"""One row with every prompt once, compared with each sequence run alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.objective.packing import PackedBatch, ScoredSequence, collate, owners, pack, plan_packs
from app.objective.shared_prompt import Blocks, SharedPrompts, plan_shared, shared_prompt_attention
from app.objective.varlen_attention import shared_attention
from app.policy.model import Policy
from app.policy.modes import switch_off_dropout
from app.policy.scoring import SHARED_PROMPT, can_share_prompts, completion_logprobs

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
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 2, 3, 2]]
    assert batch.targets.tolist() == [7, 8, 9, 3, 1, 2]
    assert batch.predictors.tolist() == [1, 3, 4, 2, 1, 5]
    assert batch.sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.advantages.tolist() == [1, 1, 1, 2, -1, -1]
    assert batch.replayed.tolist() == [False, False, False, False, True, True]
    assert (batch.real_tokens, batch.sequence_tokens, batch.padding_fraction) == (6, 11, 0)
    assert batch.layout is not None
    assert batch.layout.owners.tolist() == [0, 1, 0]
    assert batch.layout.runs is None  # the completions of a prompt are apart
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
    # Padding repeats a token that there is.
    assert Blocks.of(np.array([1, 0])).pad(values[:1]).tolist() == [[[[0, 1]]], [[[0, 1]]]]


@pytest.mark.parametrize("make", [qwen, llama], ids=["qwen_gqa_tied", "llama"])
def test_logprobs_and_gradients_equal_those_of_sequences_alone(make: object, sequences: list[ScoredSequence]) -> None:
    model = make()  # type: ignore[operator]
    assert can_share_prompts(model)

    def run(batches: list) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        outputs = [completion_logprobs(model, batch, 0.7, with_entropy=True) for batch in batches]
        logprobs, entropies = (torch.cat(values) for values in zip(*outputs, strict=True))
        weights = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
        (weights * logprobs + 0.1 * entropies).sum().backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        return logprobs.detach(), gradient

    expected = run([collate([sequence]) for sequence in sequences])
    actual = run([pack(sequences)])
    assert expected[1].norm() > 1
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    # Qwen2 and Llama compute their norms in float32 for weights of any type.
    assert (actual[1] - expected[1]).norm() <= 1e-7 * expected[1].norm()
    assert model.config._attn_implementation == "sdpa"


def test_recomputed_layers_attend_as_in_the_forward_pass(sequences: list[ScoredSequence], tmp_path: Path) -> None:
    qwen().float().save_pretrained(tmp_path)
    found = []
    for recompute in (False, True):
        model = Policy(str(tmp_path), dtype="float64", gradient_checkpointing=recompute).load()
        assert can_share_prompts(model)
        passes: list[str] = []
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda one, *_, passes=passes: passes.append(one.config._attn_implementation))
        switch_off_dropout(model)
        logprobs, _ = completion_logprobs(model, pack(sequences), 0.7, with_entropy=False)
        logprobs.sum().backward()
        assert passes == [SHARED_PROMPT] * (1 + recompute)
        assert model.config._attn_implementation == "sdpa"
        found.append([logprobs.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_which_models_can(sequences: list[ScoredSequence]) -> None:
    sliding = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not can_share_prompts(sliding)
    checkpointed = qwen()  # not loaded by `Policy`, so that nothing keeps the attention for the backward pass
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
    assert plan_shared([0], [1], [1], 5) == [[0]]
    # Prompt 0 takes 1 + 4 of 10 tokens. Prompt 1 takes 1 + 3 + 3 + 3, a whole micro-batch, and is not torn apart
    # although one of its completions would fit into the first.
    assert plan_shared([0, 1, 1, 1], [1, 1], [5, 4, 4, 4], 10) == [[0], [1, 2, 3]]
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


def test_a_prompt_is_recognised_whatever_holds_its_tokens() -> None:
    kinds = ([5, 6], (5, 6), np.array([5, 6], dtype=np.int32), np.array([5, 6]), [5, 6, 0])
    owner, chosen = owners([ScoredSequence(kind, [1], [-1.0], 1.0, 1.0) for kind in kinds])
    assert (owner.tolist(), chosen) == ([0, 0, 0, 0, 1], [0, 4])


def test_completions_of_one_token_add_nothing_to_the_prompts() -> None:
    prompts = [3, 7, 2], [9]
    made = [ScoredSequence(prompts[owner], [token], [-1.0], 1.0, 0.1) for owner, token in [(0, 4), (1, 5), (0, 6)]]
    batch = pack(made)
    assert batch.input_ids.tolist() == [[3, 7, 2, 9]]
    assert batch.predictors.tolist() == [2, 3, 2]
    assert batch.layout is not None
    assert batch.layout.completions.shape == (3, 0)
    model = qwen()
    with torch.no_grad():
        together, _ = completion_logprobs(model, batch, 1.0, with_entropy=False)
        apart = torch.cat([completion_logprobs(model, collate([one]), 1.0, with_entropy=False)[0] for one in made])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


HEADS, WIDTH = 2, 3
# Prompts at 0 .. 1 and 2 .. 4; completions of prompt 1 at 5 .. 6, of prompt 0 at 7, of prompt 1 none.
SEEN = [[0], [0, 1], [2], [2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5, 6], [0, 1, 7]]


def layout_of_seen() -> SharedPrompts:
    return SharedPrompts(np.array([2, 3]), np.array([2, 1, 0]), np.array([1, 0, 1]))


def states(heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(len(SEEN), n, WIDTH, generator=generator, dtype=torch.float64) for n in (HEADS, heads, heads)]


def attention_by_a_loop(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows = []
    for token, seen in enumerate(SEEN):
        for head in range(HEADS):
            weights = torch.softmax(scale * key[seen, head] @ query[token, head], 0)
            rows.append(weights @ value[seen, head])
    return torch.stack(rows).reshape(len(SEEN), HEADS, WIDTH)


def test_attention_equals_a_loop_over_tokens() -> None:
    given = states()
    for scale, factor in ((None, WIDTH**-0.5), (0.3, 0.3), (2.0, 2.0)):
        found = layout_of_seen().attend(*given, scale=scale, dropout=0.0)
        torch.testing.assert_close(found, attention_by_a_loop(*given, factor), rtol=1e-12, atol=1e-12)


# As a planned micro-batch has them, prompt after prompt; one completion and all of the second prompt add no token.
LENGTHS = np.array([2, 4, 3]), np.array([3, 1, 0, 2, 0]), np.array([0, 0, 1, 2, 2])


def grouped_states(heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (int(LENGTHS[0].sum() + LENGTHS[1].sum()), 4, 8)
    made = [torch.randn(shape[0], n, 8, generator=generator, dtype=torch.float64) for n in (4, heads, heads)]
    return [one.to(dtype).requires_grad_() for one in made]


def values_and_gradients(attend: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    output = attend(*given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), given)]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_in_runs_equals_that_with_a_mask(heads: int, dtype: torch.dtype, apart: float) -> None:
    layout = SharedPrompts(*LENGTHS)
    assert layout.runs is not None
    own, read = layout.runs
    assert [(one.queries.tolist(), one.keys.tolist()) for one in (own, read)] == [
        ([2, 4, 3, 3, 1, 0, 2, 0], [2, 4, 3, 3, 1, 0, 2, 0]), ([4, 0, 2], [2, 4, 3]),
    ]  # fmt: skip
    given = grouped_states(heads, dtype)
    expected = values_and_gradients(lambda *states: layout.attend(*states, scale=0.3, dropout=0.0), given)
    found = values_and_gradients(lambda *states: shared_attention(*states, own, read, 0.3), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=apart, atol=apart)


def test_half_precision_attends_in_runs() -> None:
    layout = SharedPrompts(*LENGTHS)
    exact = values_and_gradients(lambda *states: layout.attend(*states, scale=None, dropout=0.0), grouped_states(2))
    assert "mask" in vars(layout)
    layout = SharedPrompts(*LENGTHS)
    half = values_and_gradients(
        lambda *states: layout.attend(*states, scale=None, dropout=0.0), grouped_states(2, torch.bfloat16)
    )
    assert "mask" not in vars(layout)
    for one, other in zip(half, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert 0 < (one.double() - other).norm() <= 2**-7 * other.norm()


@pytest.mark.parametrize(
    "lengths",
    [([2, 3], [3, 1, 2], [0, 1, 0]), ([2, 3], [0, 0], [0, 1])],
    ids=["completions of a prompt are apart", "no tokens after the prompts"],
)
def test_what_runs_cannot_hold_is_left_to_the_mask(lengths: tuple[list[int], ...]) -> None:
    layout = SharedPrompts(*map(np.array, lengths))
    assert layout.runs is None
    tokens = sum(lengths[0]) + sum(lengths[1])
    states = [torch.randn(tokens, 2, 8, dtype=torch.float64) for _ in range(3)]
    exact, half = (
        layout.attend(*(one.to(dtype) for one in states), scale=None, dropout=0.0)
        for dtype in (torch.float64, torch.bfloat16)
    )
    torch.testing.assert_close(half.double(), exact, rtol=0.02, atol=0.02)


def test_bytes_kept_are_those_of_a_kernel_of_variable_length() -> None:
    """Eight completions of 3,072 tokens after one prompt of 200, with 1.5B's ratio of heads."""
    heads, key_heads, width, tokens = 6, 1, 16, 200 + 8 * 3071
    layout = SharedPrompts(np.array([200]), np.full(8, 3071), np.zeros(8, dtype=np.int64))
    query, key, value = (
        torch.randn(1, tokens, n, width).bfloat16().transpose(1, 2).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = shared_prompt_attention(torch.nn.Identity(), query, key, value, None, layout=layout)
    # Queries, keys, values and output in two bytes, and a log-sum-exp per head in four.
    assert sum(kept.values()) <= 1.01 * tokens * (2 * width * (2 * heads + 2 * key_heads) + 4 * heads)
    assert output.requires_grad


def test_dropout_reaches_prompts_and_completions() -> None:
    # With all weights dropped nothing is left.
    assert not layout_of_seen().attend(*states(), scale=None, dropout=1.0).any()


def transposed(given: list[Tensor]) -> list[Tensor]:
    """As a model holds them: `[1, heads, N, width]`."""
    return [one.transpose(0, 1)[None] for one in given]


@pytest.mark.parametrize("heads", [1, HEADS])
def test_attention_as_a_model_calls_it(heads: int) -> None:
    query, key, value = states(heads)
    shared = [one.expand(-1, HEADS, -1) for one in (key, value)]
    found, weights = shared_prompt_attention(
        torch.nn.Identity(), *transposed([query, key, value]), None, scaling=0.3, layout=layout_of_seen()
    )
    assert weights is None
    torch.testing.assert_close(found, attention_by_a_loop(query, *shared, 0.3)[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"softcap": 30.0}, "Identity: softcap is not supported; set model.share_prompts to false"),
        ({"sliding_window": 4}, "sliding_window is not supported"),
        ({"s_aux": torch.zeros(2)}, "s_aux is not supported"),
        ({"position_bias": torch.zeros(1)}, "position_bias is not supported"),
        ({"softcap": 30.0, "s_aux": torch.zeros(2)}, "Identity: softcap, s_aux is not supported"),
        ({"attention_mask": torch.ones(1, 8)}, "Identity: attention_mask is not supported"),
        ({"layout": None}, "Identity: layout is missing"),
    ],
)
def test_attention_of_another_kind_is_refused(wanted: dict, message: str) -> None:
    given = {"attention_mask": None, "layout": layout_of_seen(), "softcap": None, "sliding_window": None, **wanted}
    with pytest.raises(ValueError, match=message):
        shared_prompt_attention(torch.nn.Identity(), *transposed(states()), **given)


def tensors_of(batch: PackedBatch) -> list[Tensor]:
    parts: list[object] = [batch]
    held: list[object] = []
    if batch.layout is not None:
        parts += [batch.layout.prompts, batch.layout.completions, *(batch.layout.runs or ())]
        held += [batch.layout.owners, batch.layout.mask]
    held += [getattr(part, name) for part in parts for name in part.__slots__]  # type: ignore[attr-defined]
    return [one for one in held if isinstance(one, Tensor)]


@pytest.mark.parametrize(("lay_out", "count"), [(collate, 11), (pack, 11 + 6 + 4)])
def test_everything_is_put_on_the_device_asked_for(
    sequences: list[ScoredSequence], lay_out: object, count: int
) -> None:
    ordered = [sequences[row] for row in plan_packs(sequences, 1000)[0]]
    held = tensors_of(lay_out(ordered, device="meta"))  # type: ignore[operator]
    assert len(held) == count
    assert {one.device.type for one in held} == {"meta"}
