"""The policy: any Hugging Face causal language model, loaded, adapted and described.

A file for private names of transformers: `_attn_implementation` names the attention, `_supports_attention_backend` says
whether a model goes through `AttentionInterface` at all, `_tied_weights_keys` names the weights that share a tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from app.policy.adapters import Lora, add_lora, causal_lm
from app.policy.fused_layers import fuse_layers
from app.policy.liger import add_liger
from app.policy.modes import Recompute
from datamodules.errors import UserError

HEAD_PRECISION = "dots_head_precision"
"""Attribute of a model that holds its policy's option of that name."""


@dataclass
class Policy:
    """The model to train and how to load it.

    Args:
        path: folder or hub name of a Hugging Face causal language model with its tokenizer.
        dtype: dtype of the weights; "auto" is float32 for trained weights, whatever the file's, since updates are too
            small for 16 bits, and the file's for weights that `lora` freezes. `trainer.precision: bf16-mixed` computes
            in bfloat16. "float64" is for comparing runs: it makes differences in the order of sums (ranks,
            micro-batches) too small to show in float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attn_implementation: "sdpa", "flash_attention_2", "eager"; None lets transformers choose.
        head_precision: of the output head's matrix products in updates: "float32", "bfloat16" or, on GPUs that have it,
            "tf32", each with sums in float32; "auto" is bfloat16 on GPUs where the layers compute in it, else float32.
        kernels: "liger" takes Liger's Triton kernels for norms, gated MLPs and rotations (package liger-kernel, GPUs
            alone); "torch" keeps torch's.
        lora: train low-rank adapters instead of all weights.
        trust_remote_code: run code that comes with the model. Set it only if you trust the author.
    """

    path: str
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    head_precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    kernels: Literal["torch", "liger"] = "torch"
    lora: Lora | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype in ("bfloat16", "float16") and self.lora is None:
            raise UserError(
                f"policy.dtype is {self.dtype}, but without policy.lora all weights are trained, and most updates are "
                "too small to change a 16-bit weight. Leave it out (float32), and set trainer.precision to bf16-mixed "
                "to compute in bfloat16."
            )
        if self.dtype == "float64" and self.kernels == "liger":
            raise UserError(
                "policy.kernels is liger, whose kernels compute in float32, but policy.dtype is float64. Leave one of "
                "them out."
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the policy's tokenizer; its padding token is the end token if the model has none.

        Raises UserError if there is no tokenizer, or it has no end token that the model knows.
        """
        tokenizer = self._load(AutoTokenizer)
        rows = self._config().get_text_config(decoder=True).vocab_size
        # transformers returns an empty tokenizer for a folder without a tokenizer's files.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise UserError(
                f"policy.path={self.path}: cannot be loaded by AutoTokenizer (it holds no vocabulary). Expected the "
                "tokenizer's files (tokenizer.json) next to the weights"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"policy.path={self.path}: its tokenizer has no end token. Set eos_token in tokenizer_config.json"
            )
        if tokenizer.eos_token_id >= rows:
            raise UserError(
                f"policy.path={self.path}: the end token {tokenizer.eos_token!r} of its tokenizer is number "
                f"{tokenizer.eos_token_id}, but the model has {rows} tokens, so that no completion could end. Resize "
                "the model's embedding to its tokenizer, or set another eos_token in tokenizer_config.json"
            )
        # Padding is never read, so that any token will do.
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self) -> torch.nn.Module:
        """Load the model with its weights, adapted if `lora` is set, in training mode. Raises UserError if it can't."""
        self._config()
        options = {"dtype": self.weights_dtype(), **self._attention()}
        # use_safetensors, because the other format is pickle.
        model, read = self._load(AutoModelForCausalLM, **options, use_safetensors=True, output_loading_info=True)
        if missing := sorted(read["missing_keys"]):
            raise UserError(
                f"policy.path={self.path}: its weights lack {len(missing)} tensors of {type(model).__name__} "
                f"({missing[0]}), which would be initialized at random. Expected a causal language model with its head"
            )
        ends = getattr(model.generation_config, "eos_token_id", None)
        if any(not isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
            raise UserError(
                f"policy.path={self.path}: eos_token_id in its config.json or generation_config.json is {ends!r}. "
                "Expected the number of a token, or a list of them"
            )
        return self._adapt(model).train()

    def on_meta(self) -> torch.nn.Module:
        """Return the model on the meta device: to count its parameters, or to shard it before loading weights."""
        config = self._config()
        options = {"trust_remote_code": self.trust_remote_code, "dtype": self.weights_dtype(), **self._attention()}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
            return self._adapt(model).train()

    def positions(self) -> int | None:
        """Return the number of positions of its context, or None if the model does not say."""
        return getattr(self._load(AutoConfig).get_text_config(decoder=True), "max_position_embeddings", None)

    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of the weights in the policy's files, as config.json has it."""
        return getattr(self._config(), "dtype", None) or torch.float32

    def weights_dtype(self) -> torch.dtype:
        """Return the dtype that the weights will have in memory, adapters aside, without loading them."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        stored = self.stored_dtype()
        return stored if self.lora is not None else torch.promote_types(stored, torch.float32)

    def unknown_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """Return the tokens that the tokenizer knows and the model does not, by number."""
        rows = self._config().get_text_config(decoder=True).vocab_size
        return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}

    def _config(self) -> PreTrainedConfig:
        """Return the model's configuration. Raises UserError unless it is a causal language model's."""
        config: PreTrainedConfig = self._load(AutoConfig)
        kind, text = type(config), config.get_text_config(decoder=True)
        names = getattr(config, "architectures", None) or []
        fitting = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None), "__name__", "")
        wrong = None
        if getattr(config, "is_encoder_decoder", False):
            wrong = f"it is an encoder with a decoder ({', '.join(names) or config.model_type})"
        elif kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            wrong = f"its tokens see those that follow ({', '.join(names) or config.model_type})"
        elif names and not (
            "AutoModelForCausalLM" in getattr(config, "auto_map", {})  # a class of its own
            or any(name == fitting or name.endswith(("ForCausalLM", "LMHeadModel", "Model")) for name in names)
        ):
            wrong = f"config.json says {', '.join(names)}"
        if wrong:
            raise UserError(f"policy.path={self.path}: {wrong}. Expected a causal language model with its head")
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            size = getattr(text, name, 1)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"policy.path={self.path}: {name} in its config.json is {size!r}. Expected 1 or more")
        return config

    def _load(self, kind: Any, **options: Any) -> Any:
        folder = Path(self.path).expanduser()
        looks_local = folder.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1
        if looks_local and not folder.is_dir():
            raise UserError(
                f"policy.path={self.path}: no such folder. Expected a Hugging Face model folder or hub name"
            )
        if self.trust_remote_code:
            rank_zero_warn(f"policy.trust_remote_code runs code from {self.path} with your permissions")
        try:
            where = str(folder) if folder.is_dir() else self.path
            if options.get("use_safetensors"):
                self._check_index(where)
            return kind.from_pretrained(where, trust_remote_code=self.trust_remote_code, **options)
        except UserError:
            raise
        except Exception as error:  # any kind: what a wrong file raises is not documented
            if isinstance(error, OSError) and not folder.is_dir() and "connect" in str(error):
                raise UserError(
                    f"policy.path={self.path}: there is no such folder here, and the hub cannot be reached. Set "
                    "model.policy.path to a folder with the model; dots describe reads its config.json alone"
                ) from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"policy.path={self.path}: cannot be loaded by {kind.__name__} ({reason}). "
                "Expected a folder or hub name with config.json, weights in safetensors and a tokenizer"
            ) from error

    def _check_index(self, where: str) -> None:
        """Raise UserError if the index of the weights names something else than safetensors files next to it."""
        index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        files = {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        for name in set(files.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"policy.path={self.path}: {SAFE_WEIGHTS_INDEX_NAME} names {name!r}. Expected names of "
                    ".safetensors files in the same folder"
                )

    def _attention(self) -> dict[str, str]:
        return {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}

    def _adapt(self, model: PreTrainedModel) -> torch.nn.Module:
        setattr(model, HEAD_PRECISION, self.head_precision)
        if full_attention_only(model.config):
            fuse_layers(model)
        if self.kernels == "liger":
            add_liger(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    Recompute(model, layer)
        return model if self.lora is None else add_lora(model, self.lora)


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the decoder layers: the longest module list of the model. Raises UserError if it has none."""
    lists = [module for module in causal_lm(model).modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers. Choose another policy")
    return max(lists, key=len)


def full_attention_only(config: PreTrainedConfig) -> bool:
    """Return True if every layer attends to the whole context: no sliding window, no linear attention."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def plain_attention(lm: PreTrainedModel) -> bool:
    """Return True if attention is full in all layers, without soft-cap, and called through `AttentionInterface`."""
    return (
        getattr(lm, "_supports_attention_backend", False)
        and full_attention_only(lm.config)
        and getattr(lm.config, "kv_lora_rank", None) is None  # latent attention: values as wide as keys are assumed
        and getattr(lm.config, "attn_logit_softcapping", None) is None
    )


def tied_weight_names(lm: PreTrainedModel) -> set[str]:
    """Return the names of weights that are the same tensor as another one, such as a tied head."""
    return set(lm._tied_weights_keys or ()) if getattr(lm.config, "tie_word_embeddings", False) else set()


def uses_sdpa(lm: PreTrainedModel) -> bool:
    """Return whether the model's attention is torch's `scaled_dot_product_attention`."""
    return lm.config._attn_implementation == "sdpa"
