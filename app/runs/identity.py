"""The parts of a run that must be the same when its checkpoint is resumed."""

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

FORMAT = 2
"""Version of what a checkpoint holds. Increase it when older checkpoints can no longer be resumed."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What cannot change halfway through a run without mixing the numbers of two different runs.

    Attributes:
        tokenizer: hash of vocabulary, rules, special tokens and chat template.
        pool: hash of the training prompts as the policy reads them, with their answers, in order.
        prompts: the same hash, independent of the order.
        group_size: completions per prompt.
        seed: of the run, which may change where the prompts are the same with both.
    """

    tokenizer: str
    pool: str
    prompts: str
    group_size: int
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, pool: PromptPool, group_size: int, seed: int) -> RunIdentity:
        """Return the identity of a run."""
        # The tokenizer's part is everything that decides which ids a text becomes.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules: Any = sorted(tokenizer.get_vocab().items())
        if backend is not None:
            rules = json.loads(backend.to_str())
            for set_by_calls in ("truncation", "padding"):
                rules.pop(set_by_calls, None)
        parts = [rules, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template]
        hashed = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        return cls(hashed, pool.content(in_order=True), pool.content(in_order=False), group_size, seed)

    def as_dict(self) -> dict[str, str | int]:
        """Return plain values for a checkpoint, with the checkpoint's format."""
        return {"format": FORMAT, **asdict(self)}

    def check(self, saved: Mapping[str, object]) -> None:
        """Compare this run with the identity stored in a checkpoint.

        Raises:
            UserError: another version of Dots wrote the checkpoint, or a part of the run differs.
        """
        remedy = "Resume with the one it was saved with, or leave --ckpt_path out to start a new run"
        if (found := saved.get("format", 1)) != FORMAT:
            raise UserError(
                f"the checkpoint was written by another version of Dots (its format is {found}, this version reads "
                f"{FORMAT}). Resume it with that version, or leave --ckpt_path out to start a new run"
            )
        if saved.get("tokenizer") != self.tokenizer:
            raise UserError(f"the checkpoint was saved with another tokenizer: token ids would change. {remedy}")
        if saved.get("group_size") != self.group_size:
            raise UserError(
                f"model.sampling.num_generations={self.group_size}, but the checkpoint was saved with groups of "
                f"{saved.get('group_size')}, and its replay buffer holds groups of that size. {remedy}"
            )
        if saved.get("pool") == self.pool:
            return
        differ = "with another prompt pool (prompts, answers or template differ): its record of the pool would be wrong"
        if saved.get("prompts") == self.prompts:
            differ = "with the same prompts in another order"
        if (seed := saved.get("seed", self.seed)) != self.seed:
            remedy = (
                f"Its run had seed_everything={seed}, this one has {self.seed}, and the seed draws the prompts that "
                f"data.val_size holds out and generated ones: resume with --seed_everything {seed}"
            )
        else:
            remedy += (
                ". To go on with other data, write the policy by dots export RUN --out FOLDER and start a new run with "
                "--model.policy.path FOLDER"
            )
        raise UserError(f"the checkpoint was saved {differ}. {remedy}")


def check_weights(model: torch.nn.Module, saved: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Compare the names and shapes of a model's tensors with those of a checkpoint's `state_dict`.

    Args:
        model: the policy; it may be on the meta device.
        saved: tensors by name.
        prefix: prefix of the model's tensors in `saved`.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items() if name.startswith(prefix)}
    name = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
    if name is not None:
        there, here = (f"the shape {sizes[name]}" if name in sizes else "no such tensor" for sizes in (found, expected))
        raise UserError(
            f"the checkpoint belongs to another model: for {name.removeprefix(prefix)} the checkpoint has {there} and "
            f"the policy has {here}. Set model.policy to what it was when the checkpoint was saved"
        )
