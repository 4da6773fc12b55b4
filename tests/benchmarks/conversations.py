"""Measure what turns cost: conversations against completions of one turn with as many generated tokens.

    python -m tests.benchmarks.conversations POLICY [--turns 4] [--tokens 32] [--reply 4] [--conversations 64]
        [--prompts 64] [--prompt_tokens 24] [--pairs 4] [--vllm]

Every turn has `--tokens` tokens, whatever the policy writes (no token ends it), and every reply 1 to `--reply` tokens.
Replies are made up in this process, so that the seconds are those of the engine alone.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.engines import RolloutEngine, Sampling, Transformers, Vllm
from datamodules.types import Prompt
from tests.support.scripted_conversations import EqualConversations


def engine_of(path: str, vllm: bool) -> RolloutEngine:
    """Return an engine with the policy at a path, whose generations no token ends."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    engine = Vllm(cpu_cache_gib=1.0) if vllm else Transformers()
    engine.setup(model.eval(), tokenizer)
    engine.push(model.state_dict().items(), 0)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy")
    counts = {"turns": 4, "tokens": 32, "reply": 4, "conversations": 64, "prompts": 64, "prompt_tokens": 24, "pairs": 4}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vllm", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = engine_of(given.policy, given.vllm)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{n}", n, "", "", tuple(draw.integers(5, 200, given.prompt_tokens).tolist()), {})
        for n in range(given.prompts)
    ]
    seeds = np.arange(given.conversations).reshape(given.prompts, -1)
    ratios = []
    for _ in range(given.pairs + 1):
        talks = EqualConversations(prompts, seeds, given.turns, given.tokens, given.reply)
        start = time.perf_counter()
        engine.converse(talks, Sampling(1, given.tokens))
        turned = time.perf_counter() - start
        start = time.perf_counter()
        engine.generate(prompts, Sampling(seeds.shape[1], given.turns * given.tokens), seeds)
        whole = time.perf_counter() - start
        said = sum(len(reply) for talk in talks.talks for reply in talk.replies)
        generated = sum(len(turn.token_ids) for talk in talks.talks for turn in talk.turns)
        assert generated == given.conversations * given.turns * given.tokens
        ratios.append(turned / whole)
        print(f"{generated} tokens generated, {said} said: {turned:.2f} s, in one turn {whole:.2f} s: {ratios[-1]:.2f}")
    print(f"median of {given.pairs} pairs after the first: {np.median(ratios[1:]):.2f}")
    engine.close()


if __name__ == "__main__":
    main()
