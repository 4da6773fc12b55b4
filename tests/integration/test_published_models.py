"""Published models in miniature: their architectures and settings, with random weights of a few thousand numbers.

`PUBLISHED` holds what their config.json, generation_config.json and tokenizer_config.json say beyond sizes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from app.cli import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule
from app.objective.options import SurrogateOptions
from app.policy.model import Policy
from app.policy.weights import export, plain_weights
from app.rewards import Format
from app.update.optimization import Optimization
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from datamodules.types import TrainBatch
from tests.support.refusal import TINY, write_pool

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
HALF = {**SMALL, "num_key_value_heads": 4}  # without grouped queries
FALCON = {name: size for name, size in HALF.items() if name != "head_dim"}
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
BOS_CHAT = "{{ bos_token }}" + CHAT


@dataclass(frozen=True)
class Published:
    """The settings of a model.

    Attributes:
        kind: `model_type`.
        config: what differs from the library's defaults, sizes included.
        dtype: of the file.
        chat: the form of its chat template; None for a base model.
        bos: its tokenizer prepends a BOS.
        generation: its generation_config.json.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    chat: str | None = None
    bos: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
QWEN_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
LLAMA_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}

# fmt: off
PUBLISHED: dict[str, Published] = {
    "Qwen2-0.5B": Published("qwen2", SMALL | TIED | {"rope_theta": 1e6, "use_sliding_window": False}),
    "Qwen2.5-1.5B-Instruct": Published("qwen2", SMALL | TIED, chat=CHAT, generation=QWEN_SAMPLING),
    "Qwen2.5-Math-7B": Published("qwen2", SMALL | UNTIED | {"rope_theta": 1e4}, generation={"max_new_tokens": 2048}),
    "Qwen3-0.6B": Published("qwen3", SMALL | TIED, chat=CHAT, generation=QWEN_SAMPLING | {"top_p": 0.95}),
    "Qwen2-57B-A14B": Published("qwen2_moe", SMALL | MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3-30B-A3B": Published("qwen3_moe", SMALL | MOE, chat=CHAT, generation=QWEN_SAMPLING),
    "Llama-2-7b-chat-hf": Published("llama", HALF, "float16", BOS_CHAT, True, LLAMA_SAMPLING | {"max_length": 4096}),
    "Meta-Llama-3-8B-Instruct": Published("llama", SMALL, "bfloat16", BOS_CHAT, True, LLAMA_SAMPLING),
    "Llama-3.2-1B": Published("llama", SMALL | TIED | {"rope_scaling": LLAMA3}, "bfloat16", None, True, LLAMA_SAMPLING),
    "TinyLlama-1.1B-Chat-v1.0": Published("llama", SMALL, "bfloat16", CHAT, True, {"max_length": 2048}),
    "Yi-6B": Published("llama", SMALL, generation={"temperature": 0.6, "top_p": 0.8}),  # without do_sample
    "internlm2-chat-as-llama": Published("llama", HALF | {"attention_bias": True}, "float16", CHAT, True),
    "DeepSeek-R1-Distill-Qwen-1.5B": Published("qwen2", SMALL | UNTIED, "bfloat16", BOS_CHAT, True, LLAMA_SAMPLING),
    "SmolLM2-135M-Instruct": Published("llama", SMALL | TIED, "bfloat16", CHAT),
    "SmolLM3-3B": Published("smollm3", SMALL | TIED | {"no_rope_layers": [1, 0]}, chat=CHAT, generation=LLAMA_SAMPLING),
    "Mistral-7B-v0.1": Published("mistral", SMALL | {"sliding_window": 16}, "bfloat16", None, True),
    "Mistral-7B-Instruct-v0.3": Published("mistral", SMALL | {"sliding_window": None}, "bfloat16", BOS_CHAT, True),
    "Mixtral-8x7B-v0.1": Published(
        "mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}, bos=True
    ),
    "gemma-2b": Published("gemma", SMALL | TIED, "bfloat16", None, True),
    "gemma-2-2b-it": Published("gemma2", SMALL | TIED | {"sliding_window": 16}, "float32", BOS_CHAT, True),
    "gemma-3-1b-it": Published(
        "gemma3_text",
        SMALL | TIED | {"sliding_window": 16},
        "bfloat16",
        BOS_CHAT,
        True,
        {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    ),
    "phi-1_5": Published("phi", HALF | {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1}, "float16"),
    "Phi-3-mini-4k-instruct": Published("phi3", HALF | {"sliding_window": 16, "attention_dropout": 0.1}, chat=CHAT),
    "phi-4": Published("phi3", SMALL | UNTIED, chat=CHAT),
    "gpt2": Published("gpt2", GPT2, "float32", generation={"do_sample": True, "max_length": 50}),
    "opt-125m": Published(
        "opt",
        HALF | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.2},
        "float16",
        None,
        True,
    ),
    "pythia-70m": Published("gpt_neox", HALF | UNTIED | {"attention_dropout": 0.1, "hidden_dropout": 0.1}, "float16"),
    "gpt-j-6b": Published("gptj", GPT2 | {"rotary_dim": 4, "attn_pdrop": 0.1, "resid_pdrop": 0.1}, "float16"),
    "gpt-neo-125m": Published(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "window_size": 16,
            "attention_types": [[["global", "local"], 1]],
            "attention_dropout": 0.1,
            "resid_dropout": 0.1,
        },
        "float32",
    ),
    "bloom-560m": Published(
        "bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "float16",
    ),
    "falcon-7b": Published(
        "falcon", FALCON | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    "falcon-rw-1b": Published("falcon", FALCON | {"alibi": True, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "stablelm-2-1_6b": Published("stablelm", HALF | {"use_qkv_bias": True, "attention_dropout": 0.1}, "float16"),
    "OLMo-1B-hf": Published("olmo", HALF | TIED | {"clip_qkv": 8.0}, "float32"),
    "OLMo-2-0425-1B": Published("olmo2", HALF | UNTIED, "float32"),
    "granite-3.1-2b-instruct": Published(
        "granite",
        SMALL
        | TIED
        | {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_dropout": 0.1,
        },
        chat=CHAT,
    ),
    "c4ai-command-r-v01": Published("cohere", SMALL | TIED | {"logit_scale": 0.0625}, "float16", BOS_CHAT, True),
    "starcoder2-3b": Published(
        "starcoder2", SMALL | TIED | {"embedding_dropout": 0.1, "residual_dropout": 0.1, "sliding_window": 16}
    ),
    "starcoderbase-1b": Published("gpt_bigcode", GPT2 | {"multi_query": True}, "float32"),
    "mpt-7b": Published("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}),
    "deepseek-moe": Published(
        "deepseek_v3",
        HALF
        | {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "bfloat16",
        BOS_CHAT,
        True,
    ),
    "OLMoE-1B-7B": Published("olmoe", HALF | {"num_experts": 4, "num_experts_per_tok": 2}),
    "ernie-4.5-0.3b": Published("ernie4_5", SMALL | TIED, chat=CHAT),
    "glm-4-9b-chat-hf": Published("glm", SMALL | UNTIED | {"attention_dropout": 0.1}, chat=CHAT),
}
# fmt: on
QUICK = (
    "Qwen2.5-1.5B-Instruct",
    "Llama-3.2-1B",
    "gemma-2-2b-it",
    "gpt2",
    "opt-125m",
)  # fmt: skip


class Collected(Callback):
    """Keeps the metrics of the last step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        self.metrics = dict(batch.metrics)


def write(published: Published, folder: Path) -> None:
    """Write a miniature of the model: config, random weights, generation settings and a tokenizer with its settings."""
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = ["<s>"] if published.bos else []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if published.bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = published.chat
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id if added else None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(published.kind, **published.config, **ids, vocab_size=len(tokenizer) + 5)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, published.dtype))
    lm.save_pretrained(folder)
    settings = ids | published.generation
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in PUBLISHED]
)
def test_a_published_model_trains_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    published, folder = PUBLISHED[name], tmp_path / "policy"
    write(published, folder)
    write_pool(tmp_path / "pool.jsonl")
    seed_everything(0, verbose=False)
    module = GRPOModule(
        Policy(str(folder)), rewards=[Format(".*[aeiou0-9]", correctness=True)], sampling=Sampling(4, 4),
        surrogate=SurrogateOptions(beta=0.1), optimization=Optimization(learning_rate=1e-3),
    )  # fmt: skip
    data = OnlinePromptDataModule(PromptFile("pool.jsonl"), prompts_per_step=4, cache_dir="cache")
    trainer = DotsTrainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[collected := Collected()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    bos = module.tokenizer.bos_token_id
    if bos is not None:
        # A chat template is complete: one without a BOS means none.
        expected = 0 if published.chat == CHAT else 1
        assert {list(one.token_ids).count(bos) for one in data.pools["train"]} == {expected}
    measured = collected.metrics
    assert measured["sampling/sampling_logp_difference/max"] < 1e-4
    assert measured["kl"] == pytest.approx(0, abs=1e-6)
    trained = {key: one.detach().clone() for key, one in plain_weights(module.policy_model)}
    assert all(one.dtype == torch.float32 for one in trained.values() if one.is_floating_point())

    out, dtype = tmp_path / "out", getattr(torch, published.dtype)
    export(module.policy_model, module.tokenizer, out, dtype)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert exported.dtype == dtype
    found = exported.state_dict()
    for key, one in trained.items():
        assert torch.equal(found[key], one.to(found[key].dtype)), key
    kept = json.loads((out / "generation_config.json").read_text())
    assert published.generation.items() <= kept.items()
    asked = json.loads((out / "config.json").read_text())
    assert {key: one for key, one in asked.items() if "drop" in key} == {
        key: one for key, one in json.loads((folder / "config.json").read_text()).items() if "drop" in key
    }
    assert AutoTokenizer.from_pretrained(out).chat_template == published.chat
