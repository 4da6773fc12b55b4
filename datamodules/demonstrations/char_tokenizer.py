"""A tokenizer of single bytes, in Hugging Face format."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

PAD, END = "<pad>", "<eos>"


def char_tokenizer(phrases: Sequence[str] = (), max_length: int = 512) -> PreTrainedTokenizerBase:
    """One token per character of ASCII text (per byte of any other).

    It is a Qwen2 tokenizer without merges: `AutoTokenizer` gives every Qwen2 checkpoint that class, whatever the
    folder says.

    Args:
        phrases: texts that are one token each wherever they occur: the fixed wording of a task costs its policy no
            length then. They are ordinary tokens, so decoding gives the text back.
        max_length: written to `model_max_length`.
    """
    vocabulary = [PAD, END, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: position for position, token in enumerate(vocabulary)},
        merges=[],
        unk_token=PAD,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer
