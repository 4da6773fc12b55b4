"""Faults of data that outsiders met, through the command: the named rows are trained on, or one line says why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from tests.support.refusal import ROOT, TINY, Place, data, model, source, write_pool
from tests.support.tables import few

FIT = ("fit", "--config", "run.yaml")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def sums(*numbers: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in numbers]


def trained_on(place: Place, *arguments: str) -> str:
    """Run; return the hash of the training prompts that its newest checkpoint holds."""
    code, said = place.run(*FIT, *arguments)
    assert code == 0, said[-2000:]
    newest = max(place.path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)["run_identity"]["prompts"]


def test_a_run_in_a_folder_whose_name_is_a_pattern_trains_on_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, rows in (("plain", sums(*range(8))), ("exp1", sums(*range(20, 28))), ("exp[1]", sums(*range(8)))):
        (tmp_path / name).mkdir()
        place = Place.at(tmp_path / name, monkeypatch, capsys)
        write_pool(place.path / "pool.jsonl", rows)
        if name != "exp1":
            found[name] = trained_on(place)
    assert found["exp[1]"] == found["plain"]


def test_a_file_is_read_by_its_own_name_and_not_as_a_pattern(place: Place) -> None:
    """Beside each file stands one that its name would match as a pattern."""
    for row, (name, other) in enumerate(NAMES):
        for path, count in ((name, 2), (other, 3)):
            (place.path / path).parent.mkdir(exist_ok=True)
            write_pool(place.path / path, sums(*range(100 * row + 10 * count, 100 * row + 11 * count)))
    place.config(lambda config: source(config).update(path=[name for name, _ in NAMES]))
    code, out, err = place.run_with_output("data", "--config", "run.yaml")
    assert code == 0, err[-2000:]
    assert f"{2 * len(NAMES)} rows read, {2 * len(NAMES)} prompts kept" in " ".join(out.split())


NAMES = [
    ("pool[1].jsonl", "pool1.jsonl"),
    ("a?.jsonl", "ab.jsonl"),
    ("part*.jsonl", "part-0.jsonl"),
    ("{x,y}.jsonl", "x.jsonl"),
    ("d[0-9]/pool.jsonl", "d7/pool.jsonl"),
    ("**.jsonl", "all.jsonl"),
]


def test_a_file_rewritten_with_its_old_time_is_trained_on(place: Place) -> None:
    pool = place.path / "pool.jsonl"
    first, time = trained_on(place), os.stat(pool)
    write_pool(pool, sums(*range(1, 9)))
    os.utime(pool, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert trained_on(place) != first


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "x.jsonl",
            b'{"question": "1 + 1 =", "answer": "2"}\n{"question": "caf\xe9"}\n',
            "'x.jsonl' line 2 is not UTF-8",
        ),
        ("x.csv", b"question,answer\n1 +\xb11 =,2\n", "'x.csv' line 2 is not UTF-8"),
        ("x.tsv", b"question\tanswer\n1 + 1 =\t2\ncaf\xe9\t3\n", "'x.tsv' line 3 is not UTF-8"),
        ("x.jsonl", b'\xe9\n{"question": "1 + 1 =", "answer": "2"}\n', "'x.jsonl' line 1 is not UTF-8"),
        ("x.csv", b"question,answer\nWhat is 1 + 1?,2,easy\n", "'x.csv' line 2 has 3 fields, but the header names 2"),
        ("x.csv", b"question,answer\na,1\nb,2\nWhat is 1, or 2?,3\n", "'x.csv' line 4 has 3 fields"),
        ("x.tsv", b"question\tanswer\na\t1\t\n", "'x.tsv' line 2 has 3 fields"),
        ("x.csv", b"question,answer,level\na,1,2\nb,2\n", "'x.csv' line 3 has 2 fields, but the header names 3"),
        ("x.jsonl", b'{"question": "a", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}\n", "line 1 is nested too deeply"),
        ("x.jsonl", b'{"a": ' * 30_000 + b"1" + b"}" * 30_000, "line 1 is nested too deeply"),
        ("x.jsonl", b'{"question": ' + b"[" * 30_000, "'x.jsonl' line 1 is nested too deeply"),
        ("pool*.jsonl", None, "'pool*.jsonl' does not exist: "),
        ("~nosuch/x", None, "'~nosuch/x' does not exist: there is no user 'nosuch'"),
        ("json", None, "'json' is neither a local file or folder"),
    ],
)
def test_one_line(place: Place, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (place.path / name).write_bytes(content)
    place.config(lambda config: source(config).update(path=name))
    assert said in place.refused(*FIT)


@pytest.mark.slow
def test_a_line_of_any_size_is_one_line(place: Place) -> None:
    with (place.path / "pool.jsonl").open("ab") as file:
        file.write(b'{"question": "' + b"a" * 100_000_000 + b'"}\n')
    line = place.refused(*FIT)
    assert "'pool.jsonl' line 9 has 100,000,017 bytes" in line and len(line) < 600


LONG = {"question": "Add these: " + "1 + " * 700 + "1 =", "answer": "701"}


@pytest.mark.parametrize("where", few(["train", "val", "split"], 1))
def test_a_prompt_without_room_for_a_completion_is_dropped_and_counted(place: Place, where: str) -> None:
    """512 positions less 3 of the completion leave 509 tokens."""
    write_pool(place.path / "pool.jsonl", [*sums(*range(8)), LONG] if where != "val" else sums(*range(8)))
    write_pool(place.path / "val.jsonl", [*sums(20, 21), LONG])
    place.config(
        lambda config: {
            "train": lambda: None,
            "split": lambda: data(config).update(val_size=3),
            "val": lambda: data(config).update(
                val={"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": "val.jsonl"}}
            ),
        }[where]()
    )
    code, out, err = place.run_with_output(*FIT, "--trainer.max_steps=4")
    assert code == 0, err[-2000:]
    assert "1 longer than 509 tokens (what the policy's context leaves beside a completion)" in " ".join(out.split())
    if where == "train":
        assert place.run(*FIT, "--trainer.max_steps=6", "--ckpt_path=last")[0] == 0


def test_lengths_are_counted_by_the_completions_of_their_pool(place: Place) -> None:
    """A prompt of 300 tokens fits beside 200 tokens of training, not beside 250 of validation."""
    rows = [*sums(*range(8)), {"question": "1" * 300, "answer": "1"}]
    write_pool(place.path / "pool.jsonl", rows)
    reports = []
    for val_size in (0, 2):
        place.config(
            lambda config, val_size=val_size: (
                model(config)["sampling"].update(max_completion_length=200),
                model(config).update(val_sampling={"num_generations": 1, "max_completion_length": 250}),
                data(config).update(val_size=val_size),
            )
        )
        code, out, err = place.run_with_output(*FIT)
        assert code == 0, err
        reports.append(" ".join(out.split()))
    assert "9 rows read, 9 prompts kept" in reports[0]
    assert "1 longer than 262 tokens" in reports[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: model(c)["sampling"].update(max_completion_length=512),
            "model.sampling.max_completion_length is 512",
        ),
        (
            lambda c: (model(c).update(val_sampling={"max_completion_length": 600}), data(c).update(val_size=2)),
            "model.val_sampling.max_completion_length is 600, which leaves no room for a prompt within the 512 tokens",
        ),
        (
            lambda c: model(c)["sampling"].update(max_completion_length=511),
            "8 longer than 1 tokens (what the policy's context leaves beside a completion). Give other data or lower",
        ),
        (
            lambda c: source(c).update(max_prompt_length=1),
            "8 longer than 1 tokens. Give other data or raise max_prompt_length",
        ),
    ],
)
def test_no_room_is_one_line_before_anything_is_written(place: Place, change: Any, said: str) -> None:
    place.config(change)
    assert said in place.refused(*FIT)


def instruct(place: Place, template: str, **special: str) -> Path:
    """Copy the tiny policy with a chat template."""
    folder = place.path / "instruct"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | special))
    return folder


CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        ("{{ 1 // 0 }}", {}, "pool.jsonl: row 1: The chat template rejects messages with the roles user: ZeroDivision"),
        ("{{ messages + 1 }}", {}, "pool.jsonl: row 1: The chat template rejects"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            {},
            "it takes more than 1 s",
        ),
        ("{{ 'x' * 100000000000 }}", {}, "MemoryError"),
        ("{{ 10 ** 10 ** 9 }}", {}, "it uses the operator **"),
        ("{{ messages[-1].content }}", {"system_prompt": "Think."}, "The chat template leaves out system messages"),
        (
            CHAT,
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs has 'enable_thinking', which",
        ),
        (CHAT, {"template": "{question:d}"}, "template '{question:d}': ValueError: "),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    place: Place, template: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.prompts.bounded.SECONDS", 1)
    folder = instruct(place, template)
    place.config(lambda config: (model(config)["policy"].update(path=str(folder)), source(config).update(options)))
    assert said in place.refused(*FIT)


def begins(place: Place) -> Path:
    """Copy the tiny policy with a tokenizer that puts a first token before every text."""
    folder = place.path / "begins"
    shutil.copytree(TINY, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first, text = {"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] |= {
        "single": [first, text],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    options = {"bos_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


@pytest.mark.parametrize(
    ("template", "question"),
    few(
        [("{question}", "<pad>ab"), ("<pad>{question}", "ab"), ("{question}", "ab"), ("<pad>Q: {question}", "<eos>ab"),
         ("", "ab")], 2,
    ),
)  # fmt: skip
def test_a_prompt_begins_with_one_first_token(place: Place, template: str, question: str) -> None:
    """Its length is that of the text with one: a lower limit drops every row, this one none."""
    folder = begins(place)
    chat = CHAT.replace("{{ message.role", "{{ bos_token }}{{ message.role")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat}))
    write_pool(place.path / "pool.jsonl", [{"question": f"{question}{n}", "answer": "1"} for n in range(4)])
    place.config(lambda c: (model(c)["policy"].update(path=str(folder)), source(c).update(template=template)))
    text = (template or "user: {question}\n").replace("{question}", f"{question}0").removeprefix("<pad>")
    tokens = AutoTokenizer.from_pretrained(folder)(text.replace("<pad>", ""))["input_ids"]
    assert tokens.count(0) == 1
    command = "data", "--config", "run.yaml", f"--data.train.max_prompt_length={len(tokens)}"
    code, out, err = place.run_with_output(*command)
    assert code == 0, err[-2000:]
    assert "4 rows read, 4 prompts kept" in " ".join(out.split())
    assert "4 longer than" in place.refused(*command[:-1], f"--data.train.max_prompt_length={len(tokens) - 1}")


def test_own_data_over_the_quickstart_keep_the_chat_template_of_the_model(place: Place) -> None:
    """The quickstart's source has a template and its reward looks after `#### `: neither is meant for other classes."""
    folder = instruct(place, CHAT)
    write_pool(
        place.path / "mine.jsonl",
        [{"instruction": "Add.", "input": f"{n} + 1", "output": f"{n + 1}"} for n in range(4)],
    )
    overlay = {
        "trainer": {
            "max_steps": 1,
            "callbacks": [],
            "val_check_interval": 1,
            "logger": {"init_args": {"save_dir": "runs"}},
        },
        "model": {
            "init_args": {
                "policy": {"path": str(folder)},
                "rewards": [{"class_path": "app.rewards.Numeric"}],
                "sampling": {"num_generations": 2, "max_completion_length": 3},
                "mini_batches": 1,
            }
        },
        "data": {
            "init_args": {
                "prompts_per_step": 2,
                "val_size": 0,
                "selector": "datamodules.selectors.Uniform",
                "train": {"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": "mine.jsonl"}},
            }
        },
    }
    (place.path / "over.yaml").write_text(yaml.safe_dump(overlay))
    configs = ("--config", str(ROOT / "configs/quickstart.yaml"), "--config", "over.yaml")
    code, out, err = place.run_with_output("fit", *configs)
    assert code == 0, err[-2000:]
    assert "rendered by the tokenizer's chat template:\nuser: Add.\n\n0 + 1\n" in out
    kept = yaml.safe_load((place.path / "runs/quickstart/version_0/config.yaml").read_text())
    assert source(kept)["template"] == ""
    assert model(kept)["rewards"][0]["init_args"]["after"] == ""
    assert kept["trainer"]["logger"]["init_args"]["name"] == "quickstart"
    code, out, err = place.run_with_output("fit", *configs, "--data.train.template", "Q {question}")
    assert code == 0, err[-2000:]
    assert "in place of the tokenizer's chat template:\n" in out


def filter_of(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"datamodules.selectors.{name}", "init_args": options}


@pytest.mark.parametrize(
    "filters",
    few(
        [
            [filter_of("ZeroVarianceSkip"), filter_of("ZeroVarianceSkip")],
            [filter_of("ZeroVarianceSkip", p_easy=share) for share in (0.2, 0.5, 0.9)],
            [filter_of("ZeroVarianceSkip", min_refill=1), filter_of("ZeroVarianceSkip", p_hard=0.1)],
            [filter_of("ZeroVarianceSkip", p_hard=0.1)] * 4,
        ],
        1,
    ),
)
def test_filters_of_one_class_are_resumed(place: Place, filters: list[dict[str, Any]]) -> None:
    composed = {"ranker": {"class_path": "datamodules.selectors.Uniform"}, "filters": filters}
    place.config(
        lambda config: data(config).update(
            selector={"class_path": "datamodules.selectors.Composed", "init_args": composed}
        )
    )
    assert place.run(*FIT)[0] == 0
    code, said = place.run(*FIT, "--trainer.max_steps=2", "--ckpt_path=last")
    assert code == 0, said[-2000:]


@pytest.mark.long
def test_a_typo_in_the_answers_column_lists_the_columns_of_the_data(place: Place) -> None:
    for reward, typo, meant in (
        ("Numeric", "anwser", "answer"),
        ("Math", "soltion", "solution"),
        ("Exact", "ground_thruth", "ground_truth"),
    ):
        named = {"class_path": f"app.rewards.{reward}", "init_args": {"gold": typo}}
        place.config(lambda config, named=named: model(config).update(rewards=[named]))
        line = place.refused(*FIT, touches=True)
        columns = "'answer', 'ground_truth', 'question', 'solution'"
        assert f"{typo!r} for gold, only {columns}: did you mean {meant!r}?" in line
        assert "log_" not in line and "trainer_state" not in line
