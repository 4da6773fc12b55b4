"""A character tokenizer in Hugging Face format."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))


def char_tokenizer(phrases: Sequence[str] = (), max_length: int = 512) -> PreTrainedTokenizerFast:
    """One token per character of ASCII text; any other character is `<unk>`.

    Args:
        phrases: texts that are one token each wherever they occur, the longest first: the fixed wording of a task
            costs its policy no length then. They are ordinary tokens, so decoding gives the text back.
        max_length: written to `model_max_length`.
    """
    vocabulary = [PAD, END, UNKNOWN, *CHARACTERS, *phrases]
    alternatives = [re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*alternatives, r"[\s\S]"])), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
