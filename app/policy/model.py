"""The policy: any Hugging Face causal language model, loaded, adapted and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from datamodules.errors import UserError


@dataclass
class Lora:
    """Low-rank adaptation through peft: only small added matrices are trained (Hu et al., arXiv 2106.09685).

    Args:
        rank: of the added matrices.
        alpha: their product is scaled by `alpha / rank`.
        dropout: on the adapters' input while training.
        target_modules: names of the linear layers to adapt; "all-linear" takes all but the head.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])


@dataclass
class Policy:
    """Which model is trained, and how it is held.

    Args:
        path: folder or hub name of a Hugging Face causal language model with its tokenizer.
        dtype: of the weights; "auto" keeps the file's. "float64" is for comparing runs: with it the order of sums
            (processes, micro-batches) moves nothing that float32 could show.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attn_implementation: "sdpa", "flash_attention_2", "eager"; None lets transformers choose.
        lora: train low-rank adapters instead of all weights.
        trust_remote_code: run code that comes with the model. Off unless you trust its author.
    """

    path: str
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    lora: Lora | None = None
    trust_remote_code: bool = False

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, with a padding token (the end token where the model has none)."""
        tokenizer = self._load(AutoTokenizer)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # What transformers makes of a folder without a tokenizer's files.
            raise UserError(
                f"policy.path={self.path}: cannot be loaded by AutoTokenizer (it holds no vocabulary); expected the "
                "tokenizer's files (tokenizer.json) beside the weights"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"policy.path={self.path}: its tokenizer has no end token; expected eos_token to be set")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self) -> torch.nn.Module:
        """The model with its weights, adapted if `lora` is set, in training mode."""
        options = {"dtype": self._torch_dtype(), **self._attention()}
        # use_safetensors: the other format is pickle.
        model, read = self._load(AutoModelForCausalLM, **options, use_safetensors=True, output_loading_info=True)
        if missing := sorted(read["missing_keys"]):
            raise UserError(
                f"policy.path={self.path}: its weights lack {len(missing)} tensors of {type(model).__name__} "
                f"({missing[0]}), which would start at random; expected a causal language model, head and all"
            )
        return self._adapt(model).train()

    def on_meta(self) -> torch.nn.Module:
        """The same model without memory or weights: to count its parameters, or to be cut before it gets them."""
        config = self._load(AutoConfig)
        options = {"trust_remote_code": self.trust_remote_code, "dtype": self.stored_dtype(), **self._attention()}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
            return self._adapt(model).train()

    def stored_dtype(self) -> torch.dtype:
        """What the weights will have once loaded, without loading them."""
        found = self._torch_dtype()
        if isinstance(found, str):
            found = getattr(self._load(AutoConfig), "dtype", None) or torch.float32
        return found

    def _load(self, kind: Any, **options: Any) -> Any:
        folder = Path(self.path).expanduser()
        looks_local = folder.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1
        if looks_local and not folder.is_dir():
            raise UserError(
                f"policy.path={self.path}: no such folder; expected a Hugging Face model folder or hub name"
            )
        if self.trust_remote_code:
            rank_zero_warn(f"policy.trust_remote_code: code that comes with {self.path} is run with your rights")
        try:
            where = str(folder) if folder.is_dir() else self.path
            return kind.from_pretrained(where, trust_remote_code=self.trust_remote_code, **options)
        except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"policy.path={self.path}: cannot be loaded by {kind.__name__} ({reason}); "
                "expected a folder or hub name with config.json, weights in safetensors and a tokenizer"
            ) from error

    def _torch_dtype(self) -> torch.dtype | str:
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)

    def _attention(self) -> dict[str, str]:
        return {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}

    def _adapt(self, model: PreTrainedModel) -> torch.nn.Module:
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model if self.lora is None else add_lora(model, self.lora)


def add_lora(model: PreTrainedModel, lora: Lora) -> torch.nn.Module:
    """`model` wrapped by peft, its own weights frozen. Needs the `lora` extra."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("policy.lora is set but peft is not installed: pip install 'dots-grpo[lora]'") from error
    if lora.rank < 1:
        raise UserError(f"policy.lora.rank={lora.rank}: expected at least 1")
    model.enable_input_require_grads()
    targets: str | list[str] = lora.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int, its arithmetic takes any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"policy.lora.target_modules={lora.target_modules}: {' '.join(str(error).split())}; "
            'expected names of linear layers, or ["all-linear"]'
        ) from error


def causal_lm(model: Any) -> PreTrainedModel:
    """The Hugging Face model itself, inside a peft wrapper or not; adapters stay active in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def attending(lm: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Forward passes with a registered attention implementation; with the model's own for None."""
    usual = lm.config._attn_implementation
    lm.config._attn_implementation = implementation or usual
    try:
        yield
    finally:
        lm.config._attn_implementation = usual


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The longest list of modules: in every decoder that is its layers. Raises UserError where there is no list."""
    lists = [module for module in causal_lm(model).modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers: expected one, choose another policy")
    return max(lists, key=len)


def full_attention_only(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to the whole context: no sliding window, no linear attention or the like."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def plain_attention(lm: PreTrainedModel) -> bool:
    """Whether attention is full in all layers, without soft-cap, and called by transformers' interface."""
    return (
        getattr(lm, "_supports_attention_backend", False)
        and full_attention_only(lm.config)
        and getattr(lm.config, "attn_logit_softcapping", None) is None
    )
