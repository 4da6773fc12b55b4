"""Several training sources and several validation sets, through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts.file import PromptFile
from tests.support.command import ROOT, logged
from tests.support.refusal import Place, data, model, write_pool

REWARDS = '''
def right(completions, trainer_state, log_extra, **columns):
    """1 for the first step's policy and 0.25 of the completions later."""
    log_extra("extracted_answer", ["yes"] * len(completions))
    return [float(trainer_state.global_step < 2 or place % 4 == 0) for place in range(len(completions))]


def wrong(completions, tests, **columns):
    return [0.0 if test else 1.0 for test in tests]
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judges.py").write_text(REWARDS)
    write_pool(tmp_path / "more.jsonl", [{"question": f"{i} + 2 =", "answer": str(i + 2)} for i in range(4)])
    write_pool(tmp_path / "code.jsonl", [{"question": f"say {i}", "tests": str(i)} for i in range(6)])
    levels = [{"question": f"{i} + 9 =", "answer": str(i + 9), "level": i % 2, "tests": ""} for i in range(6)]
    write_pool(tmp_path / "levels.jsonl", levels)
    write_pool(tmp_path / "verl.jsonl", [row | {"data_source": f"set/{row['level']}"} for row in levels])
    return Place.at(tmp_path, monkeypatch, capsys)


def source(path: str | list[str], **options: Any) -> dict[str, Any]:
    return {"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": path, **options}}


def two_of_each(config: dict[str, Any]) -> None:
    """Sums from two files, code without answers, and a validation set of each."""
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 1}
    config["trainer"]["callbacks"] = []
    config["checkpoint"] = {"every": 2, "keep": 1}
    model(config)["rewards"] = [
        {"class_path": "app.rewards.Function", "init_args": {"path": "judges.right", "name": "sum"}},
        {"class_path": "app.rewards.Function", "init_args": {"path": "judges.wrong", "name": "tests"}},
    ]
    code = {"answer_column": None, "rewards": ["tests"], "template": "# {question}\n"}
    data(config).update(
        prompts_per_step=4,
        train={
            "sums": source(["pool.jsonl", "more.jsonl"], weight=3, rewards=["sum"]),
            "code": source("code.jsonl", weight=1, **code),
        },
        val={
            "sums": {
                "source": source("levels.jsonl", rewards=["sum"]),
                "sampling": {"num_generations": 4, "temperature": 0.5},
                "pass_at_k": [1, 3],
                "size": 4,
                "every": 2,
                "tags": ["level"],
            },
            "code": source("levels.jsonl", **code),
        },
    )


def run_of(place: Place) -> Path:
    return place.path / "runs" / "small" / "version_0"


def test_sources_and_sets_are_trained_on_and_measured_apart(place: Place) -> None:
    place.config(lambda config: [two_of_each(config), config["checkpoint"].update(keep_best="val/sums/accuracy")])
    code, out, said = place.run_with_output("fit", "--config", "run.yaml")
    assert code == 0, said
    for told in ("source sums", "75.0%", "val/sums, completions", "first prompt of code, "):
        assert told in out
    found = logged(run_of(place))

    def value(name: str, step: int) -> float:
        return found[name][step]

    for step in range(4):
        assert (value("train/sums/chosen_fraction", step), value("train/code/chosen_fraction", step)) == (0.75, 0.25)
        assert (value("train/code/reward", step), value("train/code/informative_fraction", step)) == (0, 0)
    assert [value("train/sums/reward", step) for step in (0, 1)] == [1, 1]
    assert [value("train/sums/mean_success", step) for step in (2, 3)] == pytest.approx([1 / 3, 1 / 3])
    assert value("rewards/tests/mean", 0) == 0
    # The first validation, before training, then after each step; `sums` at every second of them.
    assert list(found["val/code/accuracy"].values()) == [1, 1, 1, 1]
    assert list(found["val/sums/accuracy"]) == [0, 1, 3]
    assert list(found["val/accuracy"]) == [0, 1, 3]
    first, last = 0, 3
    assert (value("val/sums/accuracy", first), value("val/accuracy", first)) == (1, 1)
    assert (value("val/sums/accuracy", last), value("val/sums/avg@4", last), value("val/accuracy", last)) == (
        0.25, 0.25, 0.625,
    )  # fmt: skip
    assert (value("val/sums/pass@1", last), value("val/sums/pass@3", last)) == (0.25, 0.75)
    # All wrong ones say the same: of three votes the single right one never wins.
    assert value("val/sums/maj@3", last) == 0
    assert (value("val/sums/maj@3", first), value("val/sums/maj@3_prompts", first)) == (1, 4)
    levels = [found.get(f"val/sums/level={level}/prompts", {}).get(last, 0) for level in (0, 1)]
    assert sum(levels) == value("val/sums/prompts", last) == 4
    assert (value("val/code/prompts", last), value("val/prompts", last)) == (6, 10)
    # The last checkpoint is that of the end; the best that of step 2, whose update is the third.
    kept = sorted(one.name for one in (run_of(place) / "checkpoints").glob("*.ckpt"))
    best = (run_of(place) / "checkpoints" / "best.ckpt").resolve().name
    assert kept == ["best.ckpt", "last.ckpt", best, "step_00000004.ckpt"]
    assert best == "step_00000002.ckpt"
    evaluations = json.loads((run_of(place) / "summary.json").read_text())["evaluations"]
    assert [one["step"] for one in evaluations] == [0, 2, 4]
    assert [one["accuracy"] for one in evaluations] == [1, 0.625, 0.625]


@pytest.mark.long
def test_a_resumed_run_is_bitwise_the_same(place: Place) -> None:
    place.config(two_of_each)
    assert place.run("fit", "--config", "run.yaml")[0] == 0
    whole = torch.load(run_of(place) / "checkpoints" / "last.ckpt", weights_only=True)
    args = ("fit", "--config", "run.yaml", "--trainer.logger.version", "again")
    assert place.run(*args, "--trainer.max_steps", "3")[0] == 0
    again = place.path / "runs" / "small" / "again" / "checkpoints" / "last.ckpt"
    code, said = place.run(*args, "--ckpt_path", str(again))
    assert code == 0, said
    found = torch.load(again, weights_only=True)
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    key = "OnlinePromptDataModule"
    assert found[key]["measured_at"] == whole[key]["measured_at"]
    assert torch.equal(found[key]["selector"]["turns"], whole[key]["selector"]["turns"])


def test_test_and_describe_know_the_sets(place: Place) -> None:
    place.config(two_of_each)
    code, out, said = place.run_with_output("test", "--config", "run.yaml")
    assert code == 0, said
    for name in ("test/sums/accuracy", "test/code/accuracy", "test/accuracy", "test/sums/level="):
        assert name in out
    code, out, said = place.run_with_output("describe", "--config", "run.yaml")
    assert code == 0, said
    assert "source code (mixture keep)" in out
    assert "weight 3" in out
    assert "val/sums, completions" in out


def test_a_column_data_source_is_measured_by_its_values(place: Place) -> None:
    place.config(lambda config: data(config).update(val=source("verl.jsonl")))
    assert place.run("fit", "--config", "run.yaml")[0] == 0
    found = logged(run_of(place))
    assert found["val/data_source=set_0/prompts"][0] == found["val/data_source=set_1/prompts"][0] == 3
    assert {"val/data_source=set_0/accuracy", "val/accuracy", "val/pass@2", "val/prompts"} <= set(found)


def test_prompts_held_out_of_several_sources_make_a_set_of_each(place: Place) -> None:
    place.config(lambda config: [two_of_each(config), data(config).pop("val"), data(config).update(val_size=8)])
    assert place.run("fit", "--config", "run.yaml", "--trainer.max_steps", "1")[0] == 0
    found = logged(run_of(place))
    assert found["val/sums/prompts"][0] + found["val/code/prompts"][0] == found["val/prompts"][0] == 8


@pytest.mark.long
def test_a_subset_of_several_sources_is_trained_on(place: Place) -> None:
    place.config(two_of_each)
    args = ("--config", "run.yaml", "--method", "ufo", "--keep", "10", "--out", "subset.jsonl")
    code, said = place.run("select", *args)
    assert code == 0, said
    written = yaml.safe_load((place.path / "subset.yaml").read_text())["data"]["init_args"]["train"]
    rows = {name: len(Path(one["init_args"]["path"]).read_text().splitlines()) for name, one in written.items()}
    assert sum(rows.values()) == 10
    assert written["sums"]["init_args"]["weight"] == 3
    code, said = place.run(
        "fit", "--config", "run.yaml", "--config", "subset.yaml", "--trainer.max_steps", "1", "--data.mixture", "free"
    )
    assert code == 0, said


def test_a_run_folder_is_selected_from_and_its_template_may_name_the_prompt(place: Place) -> None:
    rows = [{"problem": f"{n} + 1 =", "level": n % 3, "answer": str(n + 1)} for n in range(12)]
    write_pool(place.path / "problems.jsonl", rows)
    given = ("--data.train.path=problems.jsonl", "--data.train.template=Level {level}: {problem}")
    code, said = place.run("fit", "--config", "run.yaml", *given, "--data.val_size=2")
    assert code == 0, said
    code, out, said = place.run_with_output(
        "select", "runs/small/version_0", "--method=ufo", "--keep=4", "--out=subset.jsonl"
    )
    assert code == 0, said
    assert "kept 4 of 10 prompts" in out
    kept = [json.loads(line) for line in (place.path / "subset.jsonl").read_text().splitlines()]
    assert {row["problem"] for row in kept} <= {row["problem"] for row in rows}
    code, out, said = place.run_with_output("data", "--config", "run.yaml", "--config", "subset.yaml")
    assert code == 0, said
    assert "4 rows read, 4 prompts kept" in out
    assert f"| Level {kept[0]['level']}: {kept[0]['problem']}" in out


def test_several_sources_and_sets_by_the_command_line_alone(place: Place) -> None:
    """Options of a set and of its source in any order; a set is told by its own options."""
    code, out, said = place.run_with_output(
        "fit", "--model.policy.path=x", "--data.train.a.path=a.jsonl", "--data.train.b.limit=3",
        "--data.train.b.path=b.jsonl", "--data.val.one.path=c.jsonl", "--data.val.two.every=3",
        "--data.val.two.path=d.jsonl", "--data.val.two.sampling.num_generations=4", "--data.test.path=e.jsonl",
        "--data.test.size=5", "--data.test.limit=7", "--print_config",
    )  # fmt: skip
    assert code == 0, said
    found = yaml.safe_load(out)["data"]["init_args"]
    train = {name: one["init_args"] for name, one in found["train"].items()}
    assert [(name, one["path"], one["limit"]) for name, one in train.items()] == [
        ("a", "a.jsonl", None),
        ("b", "b.jsonl", 3),
    ]
    assert found["val"]["one"]["init_args"]["path"] == "c.jsonl"
    two = found["val"]["two"]
    assert (two["every"], two["source"]["init_args"]["path"], two["sampling"]["num_generations"]) == (3, "d.jsonl", 4)
    test = found["test"]
    assert (test["size"], test["source"]["init_args"]["path"], test["source"]["init_args"]["limit"]) == (
        5,
        "e.jsonl",
        7,
    )
    flat = {"data": {"val": {"one": {"path": "c.jsonl", "every": 2, "sampling": {"num_generations": 3}}}}}
    (place.path / "flat.yaml").write_text(yaml.safe_dump(flat))
    code, out, said = place.run_with_output(
        "fit", "--config", "flat.yaml", "--model.policy.path=x", "--data.train.path=a.jsonl", "--print_config"
    )
    assert code == 0, said
    one = yaml.safe_load(out)["data"]["init_args"]["val"]["one"]
    assert (one["every"], one["source"]["init_args"]["path"], one["sampling"]["num_generations"]) == (2, "c.jsonl", 3)


def test_one_source_reads_several_files_and_a_pattern_only_where_it_is_asked_for(place: Place) -> None:
    (place.path / "part[1].jsonl").write_text((place.path / "more.jsonl").read_text())
    (place.path / "part1.jsonl").write_text((place.path / "code.jsonl").read_text())
    for options, kept in (
        (source("part[1].jsonl"), "part[1].jsonl (question -> answer): 4 rows"),
        (source("p*.jsonl", glob=True, answer_column=None, limit=13), "and 2 more (question, no answers): 13 rows"),
    ):
        place.config(lambda config, options=options: data(config).update(train=options, prompts_per_step=2))
        code, out, said = place.run_with_output("fit", "--config", "run.yaml", "--trainer.logger", "false")
        assert code == 0, said
        assert kept in " ".join(out.split())


REFUSED: dict[str, tuple[Any, str]] = {
    "pass@8 of 4": (
        lambda c: [model(c).update(pass_at_k=8), data(c).update(val=source("levels.jsonl"))],
        "model.pass_at_k asks for pass@8, but val samples 2 completions per prompt: expected 1 to 2",
    ),
    "pass@8 of a set": (
        lambda c: data(c)["val"]["sums"].update(pass_at_k=[1, 8]),
        "data.val.sums.pass_at_k asks for pass@8, but val/sums samples 4 completions",
    ),
    "reward": (
        lambda c: data(c)["train"]["code"]["init_args"].update(rewards=["test"]),
        "data.train.code names the reward 'test', which model.rewards lacks: did you mean 'tests'?",
    ),
    "tag": (lambda c: data(c)["val"]["sums"].update(tags=["levl"]), "data.val.sums.tags has 'levl', but no prompt"),
    "name": (lambda c: data(c)["train"].update({"a/b": source("more.jsonl")}), "names a source 'a/b'"),
    "weight": (lambda c: data(c)["train"]["code"]["init_args"].update(weight=-1), "weight is -1"),
    "small source": (
        lambda c: [data(c)["train"]["code"]["init_args"].update(weight=30), data(c).update(prompts_per_step=8)],
        "data.train.code has 6 prompts, but its share of the 8 prompts of a step is up to 8",
    ),
    "floor": (lambda c: data(c).update(mixture="floor"), "the weights of data.train sum to 4"),
    "keep_best": (
        lambda c: [data(c).pop("val"), c["checkpoint"].update(keep_best="val/x")],
        "has no validation prompts",
    ),
    "second file": (
        lambda c: data(c)["train"]["sums"]["init_args"].update(path=["pool.jsonl", "code.jsonl"]),
        "code.jsonl has no column 'answer'",
    ),
    "pattern": (
        lambda c: data(c)["train"]["sums"]["init_args"].update(path="*.josnl", glob=True),
        "The pattern '*.josnl' matches no file",
    ),
    "every": (lambda c: data(c)["val"]["sums"].update(every=0), "every of a validation set is 0"),
    "none": (lambda c: data(c).update(train={}), "data.train.path is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(place: Place, case: str) -> None:
    change, said = REFUSED[case]

    def changed(config: dict[str, Any]) -> None:
        two_of_each(config)
        change(config)

    place.config(changed)
    assert said in place.refused("fit", "--config", "run.yaml")


def test_a_metric_to_keep_the_best_by_that_is_not_measured_is_named_at_the_start(place: Place) -> None:
    place.config(lambda config: [two_of_each(config), config["checkpoint"].update(keep_best="val/sums/acuracy")])
    said = place.refused("fit", "--config", "run.yaml", touches=True)
    assert "checkpoint.keep_best is val/sums/acuracy, which no validation of this run measures" in said
    assert "did you mean 'val/sums/accuracy'?" in said


@pytest.mark.long
def test_the_example_of_two_sources_and_two_sets_trains(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, said = place.run(
        "fit", "--config", "configs/two_sources.yaml", "--trainer.max_steps", "1",
        "--trainer.default_root_dir", str(place.path), "--model.sampling.max_completion_length", "16",
    )  # fmt: skip
    assert code == 0, said
    found = logged(next(place.path.rglob("summary.json")).parent)
    assert found["train/sums/chosen_fraction"][0] == 0.75
    assert found["val/words/metadata.source_dataset=spell_backward/prompts"][0] == 30
    assert found["val/prompts"][0] == found["val/sums/prompts"][0] + 30


def test_no_source_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train is an empty mapping, expected at least one source"):
        OnlinePromptDataModule(train={})
    with pytest.raises(UserError, match=r"data\.train names a source 'a b', expected letters, digits"):
        OnlinePromptDataModule(train={"a b": PromptFile(path="pool.jsonl")})
