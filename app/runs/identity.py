"""What a checkpoint and the run that goes on from it must have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Parts of a run that, changed half-way, would make its numbers those of no run at all.

    Attributes:
        tokenizer: hash of vocabulary, rules, special tokens and chat template.
        pool: hash of the training prompts, as the policy reads them, with their answers, in order.
        prompts: the same, whatever the order.
        group_size: completions per prompt.
    """

    tokenizer: str
    pool: str
    prompts: str
    group_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, pool: PromptPool, group_size: int) -> RunIdentity:
        """Of a run."""
        ordered, unordered = (pool.content(in_order=in_order) for in_order in (True, False))
        return cls(tokenizer_hash(tokenizer), ordered, unordered, group_size)

    def as_dict(self) -> dict[str, str | int]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    def check(self, saved: Mapping[str, Any]) -> None:
        """Compares with what a checkpoint holds.

        Raises:
            UserError: a part differs.
        """
        go_on = "resume with the one it was saved with, or start a new run (leave --ckpt_path out)"
        if saved.get("tokenizer") != self.tokenizer:
            raise UserError(f"the checkpoint was saved with another tokenizer: token ids would change; {go_on}")
        if saved.get("group_size") != self.group_size:
            raise UserError(
                f"model.sampling.num_generations={self.group_size}, but the checkpoint was saved with groups of "
                f"{saved.get('group_size')}, which its replayed groups have; {go_on}"
            )
        if saved.get("prompts") != self.prompts:
            raise UserError(
                "the checkpoint was saved with another prompt pool (prompts, answers or template differ): what it "
                f"knows of the pool would be wrong; {go_on}"
            )
        if saved.get("pool") != self.pool:
            raise UserError(f"the checkpoint was saved with the same prompts in another order; {go_on}")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = json.loads(backend.to_str())
        for set_by_calls in ("truncation", "padding"):
            rules.pop(set_by_calls, None)
    parts = [rules, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_weights(model: torch.nn.Module, saved: Mapping[str, Any], prefix: str) -> None:
    """Compares the names and shapes of a model's tensors with those of a checkpoint's `state_dict`.

    Args:
        model: may be on the meta device.
        saved: tensors by name.
        prefix: of the model's names there.

    Raises:
        UserError: the checkpoint is of another model.
    """
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items() if name.startswith(prefix)}
    name = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
    if name is not None:
        there, here = (f"has {sizes[name]}" if name in sizes else "has none" for sizes in (found, expected))
        raise UserError(
            f"the checkpoint is of another model: of {name.removeprefix(prefix)} it {there}, the policy {here}; set "
            "model.policy as it was when it was saved"
        )
