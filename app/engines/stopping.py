"""What ends a completion: an end token, or a stop string in its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """int64: the end tokens of the model's generation config and of its tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {*configured} if isinstance(configured, Iterable) else {configured}
    return np.array(sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None), dtype=np.int64)


class StopStrings:
    """Finds stop strings at the end of growing completions.

    Args:
        strings: any of which ends a completion; special tokens count by their text.
        tokenizer: decodes.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self.tokenizer = [string for string in strings if string], tokenizer
        # A token adds at least a byte, and a few more tokens keep the string clear of the tail's ragged start.
        self.tail = max((len(string.encode()) for string in self.strings), default=0) + 8

    def completed(self, completions: Sequence[np.ndarray]) -> np.ndarray:
        """bool `[n]`: whether each completion's end holds a stop string, when it was without one a token before."""
        if not self.strings:
            return np.zeros(len(completions), dtype=bool)
        tails = self.tokenizer.batch_decode([tokens[-self.tail :].tolist() for tokens in completions])
        return np.array([any(string in tail for string in self.strings) for tail in tails], dtype=bool)
