"""The policy of an update is that of rollouts and reference: dropout is off unless it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from app.policy.model import Policy
from app.policy.modes import switch_off_dropout
from tests.support.command import logged
from tests.support.refusal import TINY, Place, model

FIT = ("fit", "--config", "run.yaml", "--trainer.max_steps=1", "--model.surrogate.beta=0.1")
VOCABULARY = len(AutoTokenizer.from_pretrained(TINY))
END = AutoTokenizer.from_pretrained(TINY).eos_token_id


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def tiny(folder: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))


def gpt2(folder: Path) -> None:  # its dropouts are 0.1 by default
    sizes = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=END)
    GPT2LMHeadModel(sizes).save_pretrained(folder)


def opt(folder: Path) -> None:
    sizes = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.5,
        max_position_embeddings=64, word_embed_proj_dim=32, eos_token_id=END, dropout=0.3, attention_dropout=0.2,
    )  # fmt: skip
    OPTForCausalLM(sizes).save_pretrained(folder)


def falcon(folder: Path) -> None:
    sizes = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.2,
        attention_dropout=0.2, eos_token_id=END,
    )  # fmt: skip
    FalconForCausalLM(sizes).save_pretrained(folder)


CASES = {
    "in attention": (tiny, ()),
    "in attention, padded": (tiny, ("--model.share_prompts=false",)),
    "in the library's defaults": (gpt2, ()),
    "of layers": (opt, ()),
    "in recomputed layers": (opt, ("--model.policy.gradient_checkpointing=true",)),
    "under adapters": (falcon, ("--model.policy.lora.rank=2", "--model.policy.lora.target_modules=[dense]")),
}


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_without_the_models_own_dropout(place: Place, name: str) -> None:
    make, arguments = CASES[name]
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    make(folder)
    place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    code, said = place.run(*FIT, *arguments)
    assert code == 0, said[-2000:]
    found = logged(place.path / "runs/small/version_0")
    assert found["kl"][0] == pytest.approx(0, abs=1e-7)
    assert found["sampling/sampling_logp_difference/max"][0] < 1e-4
    assert "updates/dropout" not in found


def test_dropout_of_adapters_is_asked_for_and_said(place: Place) -> None:
    (place.path / "halves.py").write_text(
        "def every_other(completions, **_): return [i % 2 for i in range(len(completions))]"
    )
    halves = {"class_path": "app.rewards.Function", "init_args": {"path": "halves.every_other"}}
    place.config(lambda config: model(config).update(rewards=[halves]))
    # Two mini-batches, so that adapters are not 0 in the second one.
    code, said = place.run(
        *FIT, "--model.policy.lora={rank: 2, dropout: 0.5}", "--model.mini_batches=2", "--trainer.max_steps=4",
        "--model.optimization.learning_rate=0.05",
    )  # fmt: skip
    assert code == 0, said[-2000:]
    found = logged(place.path / "runs/small/version_0")
    assert set(found["updates/dropout"].values()) == {0.5}
    assert found["sampling/sampling_logp_difference/max"][1] > 1e-2


@pytest.mark.parametrize("make", [tiny, gpt2, opt, falcon])
def test_recomputing_activations_changes_no_gradient(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(TINY, folder)
    make(folder)
    gradients, passes = [], []
    for recompute in (False, True):
        policy = Policy(str(folder), gradient_checkpointing=recompute).load()
        switch_off_dropout(policy)
        seen: list[torch.nn.Module] = []
        inner = next(one for one in policy.modules() if type(one).__name__.endswith("Attention"))
        inner.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        policy(input_ids=torch.arange(12)[None], use_cache=False).logits.float().pow(2).mean().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in policy.parameters() if one.grad is not None]))
        passes.append(len(seen))
    assert passes == [1, 2]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
