"""selectors.Posterior in a training: a prior from the data's column, time by updates, and a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.refusal import Place, write_pool

RATES = [0.0, 0.1, 0.5, None, 0.6, 1.0, "3/8", 1.0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    place = Place.at(tmp_path, monkeypatch, capsys)
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1), "pass_rate": rate} for i, rate in enumerate(RATES)]
    write_pool(tmp_path / "pool.jsonl", rows)
    return place


def selector_state(path: Path) -> dict[str, Any]:
    (last,) = path.rglob("last.ckpt")
    return torch.load(last.resolve(), weights_only=True)["OnlinePromptDataModule"]["selector"]


POSTERIOR = ("--data.selector=Posterior", "--data.selector.prior=pass_rate", "--data.selector.use_embeddings=false")


def test_a_run_with_a_prior_is_told_its_updates_and_resumes_bitwise(place: Place):
    straight, resumed = place.path / "straight", place.path / "resumed"
    common = ("fit", "--config", "run.yaml", *POSTERIOR)
    for folder, more in (
        (straight, ("--trainer.max_steps=3",)),
        (resumed, ("--trainer.max_steps=2",)),
        (resumed, ("--trainer.max_steps=3", "--ckpt_path=last")),
    ):
        code, said = place.run(*common, f"--trainer.logger.save_dir={folder}", *more)
        assert code == 0, said[-2000:]
    one, two = selector_state(straight), selector_state(resumed)
    assert one["updates"][0] == 3
    assert one["updates"] == two["updates"]
    assert one["calibration"]["bins"][:, 0].sum() == 4  # two prompts, then one beside a replayed group, twice
    assert one["model"]["step"] == two["model"]["step"]
    for part in ("model", "calibration"):
        arrays = one[part].get("arrays", one[part])
        for name, tensor in arrays.items():
            assert torch.equal(tensor, two[part].get("arrays", two[part])[name]), name
    # Four of eight prompts are likely informative for the other model; the first two choices are among them.
    assert (one["model"]["arrays"]["last"] == 1).nonzero().flatten().tolist()[0] in (2, 3, 4, 6)


def test_a_prior_that_cannot_be_used_leaves_nothing_behind(place: Place):
    said = place.refused("fit", "--config", "run.yaml", "--data.selector=Posterior", "--data.selector.prior=rate")
    assert "'rate', which is neither a JSONL file nor a column of the training prompts" in said
    said = place.refused("fit", "--config", "run.yaml", "--data.selector=Posterior", "--data.selector.prior=no.jsonl")
    assert "'no.jsonl', but there is no such file" in said
