"""A tokenizer built in code, and files written for one test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if not (continue_final_message and loop.last) %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<s>"]


def character_tokenizer(chat: bool = False, closes: bool = False, begins: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte; `<s>` begins plain text when `begins`, and `<|end|>` closes it when `closes`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("."), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<s> " * begins + "$A" + " <|end|>" * closes,
        special_tokens=[("<s>", vocabulary["<s>"]), ("<|end|>", vocabulary["<|end|>"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", bos_token="<s>", pad_token="<|end|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def shared(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not here")
    return str(path)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
