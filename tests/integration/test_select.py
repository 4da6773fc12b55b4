"""`dots select` end to end: killed and resumed, read back, trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.policy.model import Policy
from app.subsets.learnalign import alignment_scores, learnability
from datamodules.procedural import Procedural, ProceduralTask
from datamodules.prompts.file import PromptFile
from datamodules.prompts.splits import split_pool
from tests.support.command import EVERY_STEP, ROOT, dots, kill_when, run_of

CHAIN = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
TASKS = [ProceduralTask("chain_sum", 50, CHAIN), ProceduralTask("spell_backward", 20, {"max_word_len": 5})]
BASE = [
    *("--config", "configs/quickstart.yaml"),
    "--data.train.tasks=" + json.dumps([vars(task) for task in TASKS]),
    "--data.prompts_per_step=8",
    "--data.val_size=10",
    "--model.sampling.max_completion_length=48",
]
LEARNALIGN = ["--method=learnalign", "--keep=16", "--prompts_per_batch=4", "--learnalign.warmup_steps=3"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompt file of an uninterrupted selection."""
    out = tmp_path_factory.mktemp("selected") / "subset.jsonl"
    done = dots("select", *BASE, *LEARNALIGN, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.mark.long
def test_the_best_prompts_are_kept_and_read_back(selected: Path):
    tokenizer = Policy("configs/tiny_policy").load_tokenizer()
    whole, _ = split_pool(Procedural(TASKS, template="{question}\n").load(tokenizer, 0), 10, 0)
    work = selected.with_suffix(".select")
    rates, features = np.load(work / "success_rate.npy"), np.load(work / "feature.npy")
    assert features.shape == (len(whole), 4096)
    assert features.dtype == np.float32
    table = pq.read_table(selected.with_suffix(".scores.parquet")).to_pydict()
    assert table["id"] == list(whole.ids)
    np.testing.assert_array_equal(table["success_rate"], rates)
    scores = alignment_scores(learnability(rates), features)
    np.testing.assert_array_equal(table["score"], scores)
    assert set(scores[(rates == 0) | (rates == 1)]) == {0.0}
    wanted = [whole.ids[place] for place in np.argsort(-scores, kind="stable")[:16]]
    assert [name for name, kept in zip(table["id"], table["kept"], strict=True) if kept] == sorted(
        wanted, key=whole.ids.index
    )
    subset = PromptFile(str(selected), template="{question}\n").load(tokenizer, 0)
    assert subset.ids == wanted
    for prompt in subset:
        original = whole[int(whole.positions([prompt.id])[0])]
        assert (prompt.question, prompt.prompt, prompt.token_ids) == (
            original.question,
            original.prompt,
            original.token_ids,
        )
    assert selected.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.long
def test_a_selection_killed_twice_resumes_as_if_never_stopped(selected: Path, tmp_path: Path):
    """Once in its warm-up, once while it measures."""
    out = tmp_path / "subset.jsonl"
    arguments = ["select", *BASE, EVERY_STEP, *LEARNALIGN, "--out", str(out)]
    work = out.with_suffix(".select")
    kill_when(work / "warmup" / "checkpoints" / "step_00000001.ckpt", *arguments)
    assert not (work / "warmup" / "policy.ckpt").exists()
    kill_when(work / "progress.json", *arguments)
    assert 0 < json.loads((work / "progress.json").read_text())["done"] < 60
    assert not out.exists()
    done = dots(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "optimizer steps" not in done.stdout, "the warm-up is not repeated"
    for name in ("feature", "success_rate", "completions", "gradient_norm"):
        expected, found = (folder.with_suffix(".select") / f"{name}.npy" for folder in (selected, out))
        assert expected.read_bytes() == found.read_bytes(), name
    assert out.read_bytes() == selected.read_bytes()
    assert out.with_suffix(".val.jsonl").read_bytes() == selected.with_suffix(".val.jsonl").read_bytes()


@pytest.mark.long
def test_the_subset_trains(selected: Path, tmp_path: Path):
    done = dots(
        *("fit", *BASE[:2], "--config", str(selected.with_suffix(".yaml")), "--trainer.max_steps=2"),
        *("--data.prompts_per_step=8", "--trainer.val_check_interval=2", "--model.sampling.max_completion_length=48"),
        f"--trainer.logger.save_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = run_of(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["completed"], summary["steps"]) == (True, 2)
    kept = {json.loads(line)["dots_id"] for line in selected.read_text().splitlines()}
    rolled = {row["prompt_id"] for row in pq.read_table(run / "completions" / "step_00000000.parquet").to_pylist()}
    assert rolled <= kept
    # The 10 validation prompts of the whole pool: before the first step, and after each of the two batches at most.
    assert summary["validation"]["prompts"] in (20, 30)


@pytest.mark.long
def test_another_keep_needs_no_new_measurement(selected: Path):
    features = selected.with_suffix(".select") / "feature.npy"
    before, whole = features.stat().st_mtime_ns, selected.read_text().splitlines()
    less = [*LEARNALIGN, "--keep=5"]
    done = dots("select", *BASE, *less, "--out", str(selected))
    assert done.returncode == 0, done.stderr[-2000:]
    assert selected.read_text().splitlines() == whole[:5]
    assert features.stat().st_mtime_ns == before
    refused = dots("select", *BASE, *LEARNALIGN, "--out", str(selected), "--model.sampling.temperature=0.9")
    assert refused.returncode == 2
    assert "made with another sampling" in refused.stderr


@pytest.mark.long
def test_ufo_keeps_the_middle(tmp_path: Path):
    out = tmp_path / "ufo.jsonl"
    done = dots("select", *BASE, "--method=ufo", "--keep=12", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    table = pq.read_table(out.with_suffix(".scores.parquet")).to_pydict()
    confidence, kept = np.array(table["confidence"]), np.array(table["kept"])
    distance = np.abs(confidence - np.median(confidence))
    assert kept.sum() == 12
    assert distance[kept].max() <= distance[~kept].min()
    assert not (out.with_suffix(".select") / "warmup").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=learnalihn", "--keep=5", "--out=x.jsonl"], "Did you mean 'learnalign'"),
        (["--method=ufo", "--keep=500", "--out=x.jsonl"], "--keep is 500, but the training pool has 60 prompts"),
        (
            ["--method=learnalign", "--keep=5", "--out=x.jsonl", "--learnalign.parameters=lm_heat"],
            "parameters is 'lm_heat', which matches no trainable parameter",
        ),
        (
            ["--method=learnalign", "--keep=5", "--out=x.jsonl", "--learnalign.dimension=1001"],
            "dimension is 1001; set it to a multiple of 4",
        ),
        (["--method=ufo", "--keep=5", "--out=x.csv"], "choose a name that ends in .jsonl"),
        (["--method=ufo", "--keep=5", "--out=x.jsonl", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such file"),
    ],
)
def test_wrong_requests_are_one_line(options: list[str], message: str):
    done = dots("select", *BASE, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "x.select").exists()
