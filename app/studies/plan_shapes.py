"""The sizes of a decoder: from the configuration of a policy, without its weights, or by a public size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from app.policy.model import Lora, Policy, add_lora, causal_lm, decoder_layers
from app.policy.weights import count_parameters
from datamodules.errors import UserError, nearest

_QWEN, _LLAMA, _SMOL = "Qwen2.5", "Llama 3", "SmolLM2"
_PUBLIC: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "135M": (_SMOL, 576, 30, 9, 3, 1536, 49152, True),
    "360M": (_SMOL, 960, 32, 15, 5, 2560, 49152, True),
    "0.5B": (_QWEN, 896, 24, 14, 2, 4864, 151936, True),
    "1B": (_LLAMA, 2048, 16, 32, 8, 8192, 128256, True),
    "1.5B": (_QWEN, 1536, 28, 12, 2, 8960, 151936, True),
    "1.7B": (_SMOL, 2048, 24, 32, 32, 8192, 49152, True),
    "3B": (_QWEN, 2048, 36, 16, 2, 11008, 151936, True),
    "7B": (_QWEN, 3584, 28, 28, 4, 18944, 152064, False),
    "8B": (_LLAMA, 4096, 32, 32, 8, 14336, 128256, False),
    "14B": (_QWEN, 5120, 48, 40, 8, 13824, 152064, False),
    "32B": (_QWEN, 5120, 64, 40, 8, 27648, 152064, False),
    "70B": (_LLAMA, 8192, 80, 64, 8, 28672, 128256, False),
    "72B": (_QWEN, 8192, 80, 64, 8, 29568, 152064, False),
}
"""By size: family, hidden, layers, heads, key-value heads, intermediate, vocabulary, head tied. As in config.json of
SmolLM2-135M, SmolLM2-360M, Qwen2.5-0.5B, Llama-3.2-1B, Qwen2.5-1.5B, SmolLM2-1.7B, Qwen2.5-3B, Qwen2.5-7B,
Llama-3.1-8B, Qwen2.5-14B, Qwen2.5-32B, Llama-3.1-70B and Qwen2.5-72B."""
_TOLERANCE = 0.02
"""By what share of its parameters a layer may differ from its matrices (biases and norms do)."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """A decoder of equal layers: attention of `heads` queries and `kv_heads` keys, and a gated MLP.

    Attributes:
        name: what was asked for.
        layers: `L`.
        hidden: `H`.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each head.
        intermediate: width of the MLP, `I`.
        vocabulary: `V`.
        tied: whether the head is the embedding.
        qk_norm: whether queries and keys are normalised.
        parameters: of the base model, `P`.
        layer_parameters: of its largest layer.
        root_parameters: of what stands outside the layers: embedding, last norm, head.
        adapters: parameters of LoRA; 0 without.
        lora_rank: 0 without.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool
    parameters: int
    layer_parameters: int
    root_parameters: int
    adapters: int = 0
    lora_rank: int = 0

    @property
    def trained(self) -> int:
        """Parameters that get a gradient."""
        return self.adapters or self.parameters

    @property
    def queries(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys, or of all values."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Numbers in the matrices of a layer: queries and output, keys and values, the three of the MLP."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)


def shape_of(model: str, lora: Lora | None = None) -> DecoderShape:
    """The shape of a public size such as "7B", or of a Hugging Face folder or hub name; parameters are counted.

    Raises UserError for what is neither, and for a model that is no dense decoder of layers with a gated MLP.
    """
    size = model.upper()
    if size in _PUBLIC:
        with torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(_public_config(size))
            return counted(f"{size} ({_PUBLIC[size][0]} shape)", built if lora is None else add_lora(built, lora))
    if re.fullmatch(r"[0-9.]+[KMBT]", size) and not Path(model).exists():
        raise UserError(f"--model {model}: expected {', '.join(_PUBLIC)}, or a folder or hub name ({_near(size)})")
    return counted(model, Policy(model, lora=lora).on_meta())


def _near(size: str) -> str:
    return nearest(size, _PUBLIC).rstrip("?")


def _public_config(size: str) -> PreTrainedConfig:
    family, hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = _PUBLIC[size]
    make: Any = Qwen2Config if family == _QWEN else LlamaConfig
    return make(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def counted(name: str, model: Any) -> DecoderShape:
    """The shape of a built model, on the meta device or not. Raises UserError as `shape_of`."""
    config: Any = causal_lm(model).config.get_text_config(decoder=True)
    adapters = [p.numel() for n, p in model.named_parameters() if "lora_" in n]
    ranks = [p.shape[0] for n, p in model.named_parameters() if "lora_A" in n]
    layers = [_base_parameters(layer) for layer in decoder_layers(model)]
    heads = int(config.num_attention_heads)
    total = count_parameters(model)[0] - sum(adapters)
    try:
        shape = DecoderShape(
            name=name,
            layers=len(layers),
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            intermediate=int(config.intermediate_size),
            vocabulary=int(config.vocab_size),
            tied=bool(config.tie_word_embeddings),
            qk_norm=any(n.endswith(".q_norm") for n, _ in model.named_modules()),
            parameters=total,
            layer_parameters=max(layers),
            root_parameters=total - sum(layers),
            adapters=sum(adapters),
            lora_rank=max(ranks, default=0),
        )
    except AttributeError as error:
        raise UserError(f"--model {name}: {error}; expected a dense decoder with a gated MLP") from error
    if abs(shape.layer_matrices / shape.layer_parameters - 1) > _TOLERANCE:
        raise UserError(
            f"--model {name}: a layer has {shape.layer_parameters:,} parameters, where attention and a gated MLP of "
            f"its widths have {shape.layer_matrices:,}; expected a dense decoder with a gated MLP"
        )
    return shape


def _base_parameters(layer: torch.nn.Module) -> int:
    return sum(p.numel() for n, p in layer.named_parameters() if "lora_" not in n)
