"""Pretraining on demonstrations really learns, exports a usable folder, and the committed one is what its card says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from app.pretraining.card import Measured
from app.pretraining.module import DemonstrationPretraining
from app.rewards import ReasoningGym
from datamodules.demonstrations import ANSWER_MARKER
from datamodules.demonstrations.supervised import Demonstrations
from datamodules.procedural import ProceduralTask
from tests.support.command import ROOT, dots

FOLDER = ROOT / "configs" / "tiny_policy"


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def test_a_few_steps_lower_the_loss_and_the_export_is_the_trained_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    task = ProceduralTask("chain_sum", 40, {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1})
    data = Demonstrations([task], {"chain_sum": 0.1}, repeats=40, row_length=128, rows_per_batch=4, val_size=4)
    module = DemonstrationPretraining(tmp_path / "policy", layers=2, width=64, inner=128, max_completion_tokens=24)
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=60,
        limit_train_batches=60,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(module, datamodule=data)
    assert np.mean(losses.values[-5:]) < 0.6 * np.mean(losses.values[:5])

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = tokenizer("What is 1 + 2 = ?\n", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [data.tokenizer("What is 1 + 2 = ?\n")["input_ids"]]
    assert torch.equal(loaded(ids).logits, module.policy(ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"{module.measured.accuracy:.2f} of the completions" in card


@pytest.mark.long
@pytest.mark.slow
def test_the_same_seed_pretrains_the_same_weights(tmp_path: Path) -> None:
    arguments = [
        *("fit", "--config", "configs/tiny_policy.yaml", f"--trainer.default_root_dir={tmp_path}"),
        *("--trainer.limit_train_batches=10", "--trainer.logger=false", "--data.repeats=1", "--data.val_size=5"),
        "--trainer.enable_progress_bar=false",
    ]
    weights = []
    for name in ("first", "second"):
        done = dots(*arguments, f"--model.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_measured_by_hand() -> None:
    always, never, half = np.ones((1, 16)), np.zeros((2, 16)), np.tile([[1.0] * 8 + [0.0, 1.0] * 4], (1, 1))
    measured = Measured.of({"a": always, "b": np.concatenate([never, half])})
    assert measured.accuracy == pytest.approx((1 + 0 + 0 + 0.75) / 4)
    assert measured.informative == pytest.approx(0.5 / 4)  # one of the two groups of the last prompt
    assert measured.deciles == (0.5, 0, 0, 0, 0, 0, 0, 0.25, 0, 0.25)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """The committed folder, 16 completions each on prompts like those of the quickstart's pool."""
    torch.manual_seed(1)
    settings = yaml.safe_load((ROOT / "configs" / "tiny_policy.yaml").read_text())["data"]["init_args"]
    settings["tasks"] = [ProceduralTask(**task) for task in _pool()]
    data = Demonstrations(**settings | {"val_size": 160})
    policy = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = GenerationConfig.from_pretrained(FOLDER, num_return_sequences=16)
    reward, successes = ReasoningGym(after=ANSWER_MARKER), {}
    for entries in data.val_dataloader():
        inputs = tokenizer([entry["question"] + "\n" for entry in entries], return_tensors="pt", padding=True)
        with torch.no_grad():
            ids = policy.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        rows = [entry for entry in entries for _ in range(16)]
        columns = {key: [row[key] for row in rows] for key in ("answer", "metadata", "question")}
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores = reward(columns["question"], texts, ids.tolist(), **columns)
        key = f"{entries[0]['metadata']['source_dataset']} {len(successes)}"
        successes[key] = np.array(scores, dtype=float).reshape(len(entries), 16)
    return Measured.of(successes)


@pytest.mark.long
@pytest.mark.slow
def test_the_committed_policy_leaves_something_to_learn(measured: Measured) -> None:
    assert 0.15 <= measured.accuracy <= 0.50
    assert 0.25 <= measured.informative <= 0.60
    assert measured.deciles[0] >= 0.1, "prompts that almost always fail"
    assert measured.deciles[-1] >= 0.05, "prompts that are almost always solved"
    assert sum(share > 0 for share in measured.deciles) >= 9, "nothing in between"


def test_the_committed_folder_is_small_and_float32() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4 * 1024**2
    policy = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.num_parameters() < 900_000


def test_the_quickstart_pool_mixes_families_that_the_policy_has_seen() -> None:
    made_for = yaml.safe_load((ROOT / "configs" / "tiny_policy.yaml").read_text())["data"]["init_args"]["tasks"]
    families = {task["name"] for task in _pool()}
    assert len(families) >= 3
    assert families == {task["name"] for task in made_for}
    assert sum(task["size"] for task in _pool()) >= 2000


def _pool() -> list[dict[str, Any]]:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    return config["data"]["init_args"]["train"]["init_args"]["tasks"]
