"""The text of `dots data`: what was read and dropped, lengths, rendered prompts and the answers that rewards see."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.rewards import Reward, RewardScorer
from app.rewards.answers import gold_columns
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts.schemas import lookup
from datamodules.types import Prompt

_MEASURED = 10_000
_SHOWN = 3
_MAX_PROMPT = 600
_MAX_VALUE = 100


def describe_data(datamodule: OnlinePromptDataModule, scorer: RewardScorer) -> str:
    """Return the text for a data module whose pools are read."""
    tokenizer = datamodule.tokenizer
    assert tokenizer is not None, "the pools are read"
    lines: list[str] = []
    for name, pool in sorted(datamodule.pools.items(), key=lambda one: one[0] != "train"):
        lines += [f"{name}: {pool.report or f'{len(pool)} prompts'}", f"  {_lengths(pool)}"]
    pool = datamodule.pools["train"]
    for number, place in enumerate(np.unique(np.linspace(0, len(pool) - 1, _SHOWN).astype(int)), 1):
        prompt = pool[int(place)]
        lines += [
            "",
            f"prompt {number} ({prompt.id}), as the policy reads it:",
            _indented(_rendered(prompt, tokenizer)),
        ]
        for reward, called in zip(scorer.rewards, scorer.names, strict=True):
            lines.append(f"  {called} sees {_seen(reward, prompt)}")
    return "\n".join(lines)


def _lengths(pool: PromptPool) -> str:
    places = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), _MEASURED)).astype(int))
    lengths = np.array([len(pool[int(place)].token_ids) for place in places])
    least, median, high, most = np.percentile(lengths, [0, 50, 95, 100])
    of = "" if len(places) == len(pool) else f" (of {len(places):,} prompts)"
    return f"prompt tokens{of}: min {least:.0f}, median {median:.0f}, p95 {high:.0f}, max {most:.0f}"


def _rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
    half = _MAX_PROMPT // 2
    return text if len(text) <= _MAX_PROMPT else f"{text[:half]} [...] {text[-half:]}"


def _seen(reward: Reward, prompt: Prompt) -> str:
    """Return the reference answer that a built-in reward compares with, or the columns that a function is passed."""
    for path in (paths := gold_columns([reward])):
        if (value := lookup(prompt.columns, path)) is not None:
            return f"{path}={_short(value)}"
    if paths:
        return "no reference answer"
    shown = [f"{name}={_short(value)}" for name, value in prompt.columns.items()]
    return ", ".join(shown) or "no column but the prompt"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]} ..."


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
