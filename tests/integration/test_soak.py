"""Thousands of steps of a micro policy: memory and step time stay where they were.

`make test-soak` runs 2,000 steps (a few minutes on one core).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.support.command import dots
from tests.support.refusal import BASE, TINY, write_pool

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

STEPS = int(os.environ.get("DOTS_TEST_SOAK_STEPS", "2000"))
SETTLED = 200
WATCH = '''
import json, time
import psutil
from lightning.pytorch import Callback

class Watch(Callback):
    """Resident memory of trainer and reward workers (MB) and time (s) at the end of every step."""
    def __init__(self, path: str):
        self.path, self.rows = path, []
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        me = psutil.Process()
        mine = me.memory_info().rss / 2**20
        workers = sum(child.memory_info().rss for child in me.children(recursive=True)) / 2**20
        self.rows.append([mine, workers, time.perf_counter()])
    def on_train_end(self, trainer, pl_module):
        with open(self.path, "w") as file:
            json.dump(self.rows, file)
'''


def test_memory_and_step_time_stay_flat(tmp_path: Path) -> None:
    """The most of every 100 steps from step 200 on lies within 5% of the first such hundred; so does the median time,
    within a quarter (other programs share the machine)."""
    (tmp_path / "dots_watch.py").write_text(WATCH)
    micro_policy(tmp_path / "policy")
    write_pool(tmp_path / "pool.jsonl", [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(512)])
    config = json.loads(json.dumps(BASE))
    config["trainer"]["max_steps"] = STEPS
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.ReferenceRollouts", "init_args": {"size": 16, "every": 4}},
        {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 32, "admit": "all"}},
        {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 50}},
        {"class_path": "dots_watch.Watch", "init_args": {"path": str(tmp_path / "watched.json")}},
    ]
    config["model"]["init_args"]["policy"]["path"] = str(tmp_path / "policy")
    config["model"]["init_args"]["rewards"][0] = {
        "class_path": "app.rewards.Format",
        "init_args": {"pattern": "(?s)[^0-9]*[0-9].*"},
    }
    config["model"]["init_args"]["sampling"] = {"num_generations": 4, "max_completion_length": 6}
    config["data"]["init_args"] |= {"prompts_per_step": 4, "selector": {"class_path": "datamodules.selectors.Dots"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = dots("fit", "--config", "run.yaml", cwd=tmp_path, path=tmp_path, timeout=3500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = np.array(json.loads((tmp_path / "watched.json").read_text()))
    assert len(rows) == STEPS
    trainer, workers = (_of_hundreds(rows[SETTLED:, column], np.max) for column in (0, 1))
    seconds = _of_hundreds(np.diff(rows[SETTLED:, 2]), np.median)
    print(
        f"trainer MB {trainer.round(1).tolist()}\nworkers MB {workers.round(1).tolist()}\nms {(1e3 * seconds).round(1)}"
    )
    assert trainer.max() <= 1.05 * trainer[0]
    assert workers.max() <= 1.05 * workers[0]
    assert np.median(seconds[-4:]) <= 1.25 * np.median(seconds[:4])


def _of_hundreds(values: np.ndarray, measure: np.ufunc) -> np.ndarray:
    return np.array([measure(part) for part in np.array_split(values, max(2, len(values) // 100))])


def micro_policy(folder: Path) -> None:
    """One layer, 16 wide: a step is all overhead."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Qwen2Config(
        vocab_size=262, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
