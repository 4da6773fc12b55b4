"""Speed of the engine compared with `model.generate` on the same prompts, in alternating pairs."""

import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from app.engines import Sampling, Transformers
from datamodules.types import Prompt
from tests.support.scripted_conversations import EqualConversations

B, G, V, PAIRS = 32, 8, 100, 3
SHAPES = {"tiny": (4, 128, 2), "middle": (8, 256, 4)}


def policy(shape: str, ends: bool) -> Qwen2ForCausalLM:
    """Return a policy with random weights; with `ends`, about one token in 30 ends a completion, otherwise none."""
    layers, hidden, heads = SHAPES[shape]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024,
            bos_token_id=None, eos_token_id=[1, 2, 3] if ends else None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"{i}": i for i in range(V)}, unk_token="0")))


def prompts(lengths: np.ndarray) -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [Prompt(str(i), i, "", "", tuple(generator.integers(4, V, n).tolist()), {}) for i, n in enumerate(lengths)]


def plain(model: Qwen2ForCausalLM, batch: list[Prompt], tokens: int) -> None:
    """Generate for the whole batch, left-padded to its longest prompt."""
    width = max(len(p.token_ids) for p in batch)
    ids = torch.tensor([[0] * (width - len(p.token_ids)) + list(p.token_ids) for p in batch])
    model.generate(
        ids, attention_mask=(ids != 0).long(), do_sample=True, top_k=0, max_new_tokens=tokens, num_return_sequences=G
    )


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("shape", ["tiny", pytest.param("middle", marks=pytest.mark.long)])
@pytest.mark.parametrize("mixed", [False, True], ids=["same_lengths", "mixed_lengths"])
def test_not_slower_than_generate_and_faster_at_mixed_lengths(shape: str, mixed: bool) -> None:
    model = policy(shape, ends=mixed)
    batch = prompts(np.linspace(10, 80, B).astype(int) if mixed else np.full(B, 24))
    tokens = 60
    engine = Transformers()
    engine.setup(model, tokenizer())
    ratios = []
    for pair in range(PAIRS):
        seeds = np.arange(B * G).reshape(B, G) + pair * B * G
        start = time.perf_counter()
        engine.generate(batch, Sampling(G, tokens), seeds)
        middle = time.perf_counter()
        plain(model, batch, tokens)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    print(f"\n{shape}, mixed={mixed}: model.generate / engine = {np.round(ratios, 2)}")
    # The bounds leave room for a busy machine.
    assert np.median(ratios) > (1.5 if mixed else 0.8)


@pytest.mark.slow
@pytest.mark.timing
def test_turns_cost_little_more_than_completions_of_one_turn() -> None:
    """64 conversations of 4 turns with short replies; `tests.benchmarks.conversations` measures other sizes."""
    engine, batch, seeds = Transformers(), prompts(np.full(64, 24)), np.arange(64)[:, None]
    engine.setup(policy("tiny", ends=False), tokenizer())
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        engine.converse(EqualConversations(batch, seeds, turns=4, limit=24, longest_reply=3), Sampling(1, 24))
        between = time.perf_counter()
        engine.generate(batch, Sampling(1, 96), seeds)
        ratios.append((between - start) / (time.perf_counter() - between))
    assert np.median(ratios) < 1.6, ratios
