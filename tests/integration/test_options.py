"""Options that later ones take back, or that nothing uses: through the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.refusal import Place, model
from tests.support.tables import few


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    "option",
    few([["--model.policy.lora", "null"], ["--model.policy.lora=null"], ["--model.init_args.policy.lora=null"]], 1),
)
def test_null_takes_adapters_back(place: Place, option: list[str]) -> None:
    place.config(lambda config: model(config)["policy"].update(lora={"rank": 4}))
    for more, adapted in (([], True), (option, False)):
        code, said = place.run("fit", "--config", "run.yaml", *more)
        assert code == 0, said
        newest = sorted(place.path.glob("runs/small/version_*"))[-1] / "checkpoints" / "last.ckpt"
        names = torch.load(newest, weights_only=True)["state_dict"]
        assert any("lora_" in name for name in names) is adapted


def test_options_of_a_replaced_callback_are_said_to_be_unused(place: Place) -> None:
    said = [place.run("fit", "--config", "run.yaml", *more)[1] for more in ([], ["--checkpoint.every=7"])]
    assert ["the options of checkpoint are not used" in text for text in said] == [False, True]
