"""The arms of `configs/arms/`: what they change of a base, and that each of them trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from app.studies.compare.request import Arm, Budget, Request
from app.studies.compare.settings import differences, resolve
from datamodules.errors import UserError
from tests.support.command import QUICK, ROOT, dots

pytestmark = pytest.mark.slow

BASE = str(ROOT / "configs" / "quickstart.yaml")
ARMS = sorted(path.stem for path in (ROOT / "configs" / "arms").glob("*.yaml"))


def arm(name: str, *more: str) -> Arm:
    return Arm(name, (str(ROOT / "configs" / "arms" / f"{name}.yaml"), *more))


def request(rule: str = "baseline", every: int | None = 14) -> Request:
    return Request((BASE,), tuple(map(arm, ARMS)), (0, 1), "grpo", Budget(rule), every, 3)


@pytest.fixture(autouse=True)
def _as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["dots"])


@pytest.mark.long
def test_arms_change_what_selects_rolls_out_and_repeats_and_nothing_else() -> None:
    asked = request()
    found = {name: resolve(asked, arm(name), 0) for name in ARMS}
    allowed = ("ReferenceRollouts", "DynamicSampling", "RolloutReplay", "Pilots", "GroupSizes")
    for name, settings in found.items():
        for line in differences(settings, found["grpo"]):
            assert line.startswith(("data.selector", "model.reuse", *(f"callbacks.{one}" for one in allowed))), (
                name,
                line,
            )
    # The quickstart itself is DOTS.
    assert differences(found["dots"], resolve(asked, Arm("base", ()), 0)) == []
    assert found["grpo"]["trainer"]["val_check_interval"] == 14


def test_the_table_names_every_file() -> None:
    text = (ROOT / "configs" / "arms" / "README.md").read_text()
    assert [name for name in ARMS if f"`{name}.yaml`" not in text] == []


@pytest.mark.parametrize(
    ("change", "rule", "every", "message"),
    [
        ({"trainer": {"max_steps": 102},
          "model": {"class_path": "app.module.GRPOModule", "init_args": {"mini_batches": 2}}},
         "steps", 10, "51 steps (trainer.max_steps / mini_batches) are not"),
        ({"trainer": {"max_steps": 5}}, "steps", 10, "trainer.val_check_interval is 10 in a run of 5 steps"),
        ({"trainer": {"max_steps": -1}}, "steps", 10, "trainer.max_steps is -1"),
        ({"model": {"class_path": "app.module.GRPOModule", "init_args": {"optimization": {"schedule": "linear"}}}},
         "baseline", 14, "schedule is linear, which depends on trainer.max_steps"),
    ],
)  # fmt: skip
def test_arms_that_cannot_be_compared_are_refused(
    tmp_path: Path, change: dict, rule: str, every: int, message: str
) -> None:
    (tmp_path / "change.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(UserError) as refused:
        resolve(request(rule, every), arm("grpo", str(tmp_path / "change.yaml")), 0)
    assert message in str(refused.value)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains(tmp_path: Path, name: str) -> None:
    done = dots(
        "fit", "--config", BASE, "--config", arm(name).configs[0], *QUICK, "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", f"--trainer.logger.save_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    account = json.loads((tmp_path / "quickstart" / "version_0" / "summary.json").read_text())
    assert account["completed"] is True and account["steps"] == 2
    assert [one["step"] for one in account["evaluations"]] == [0, 2]
    assert (account["reference"]["completions"] > 0) == name.startswith("dots")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_subset_of_a_seed_is_evaluated_on_the_prompts_of_that_seed(tmp_path: Path) -> None:
    subset = tmp_path / "ufo_1.jsonl"
    chosen = dots("select", "--config", BASE, *QUICK[1:5], "--seed_everything=1", "--method=ufo", "--keep=24",
                  f"--out={subset}")  # fmt: skip
    assert chosen.returncode == 0, chosen.stderr[-2000:]

    def held_out(name: str, *configs: str) -> str:
        options = [part for config in configs for part in ("--config", config)]
        done = dots("fit", "--config", BASE, "--config", arm("grpo").configs[0], *QUICK, *options,
                    "--seed_everything=1", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
                    f"--trainer.logger.save_dir={tmp_path}", f"--trainer.logger.name={name}")  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        account = json.loads((tmp_path / name / "version_0" / "summary.json").read_text())
        assert account["validation"]["prompts"] == 2 * 16
        return account["validation_prompts"]

    assert held_out("whole") == held_out("subset", str(subset.with_suffix(".yaml")))
