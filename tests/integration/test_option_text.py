"""Text typed on the command line stays the text that was typed, wherever the option stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.refusal import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def parsed(place: Place, *options: str) -> dict:
    """Return the configuration of `dots fit OPTIONS` over the small run."""
    code, out, err = place.run_with_output("fit", "--config", "run.yaml", *options, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


TEXTS = [
    "Q: {question}", "# {question}", "{question}", "[{question}]", "- {question}", "'{question}'", '"{question}" is',
    "Q: {question}\nA:", "{question}: ", "{question} # {system_prompt}", "&a {question}", "@{question}=None",
    "> {question}", "{question}=None", "!{question}", "*{question}", "? {question}", "%{question}",
]  # fmt: skip


def test_text_is_taken_as_typed_wherever_text_is_expected(place: Place) -> None:
    """Two of these options must be text, the others may be null or a list; each of six runs gives six of the texts."""
    for run in range(6):
        texts = [TEXTS[(6 * run + run // 3 + place) % len(TEXTS)] for place in range(6)]
        found = parsed(
            place,
            "--data.train.template", texts[0],
            f"--data.train.system_prompt={texts[1]}",
            "--data.train.name", texts[2],
            "--data.val", "PromptFile", "--data.val.path", texts[3],
            "--data.tokenizer", texts[4],
            "--model.policy.path", texts[5],
        )  # fmt: skip
        data, model = found["data"]["init_args"], found["model"]["init_args"]
        train, val = data["train"]["init_args"], data["val"]["init_args"]
        assert [train["template"], train["system_prompt"], train["name"]] == texts[:3]
        assert [val["path"], data["tokenizer"], model["policy"]["path"]] == texts[3:]


def test_null_is_none_where_it_may_be(place: Place) -> None:
    found = parsed(
        place,
        "--data.train.answer_column=null", "--data.train.name", "null", "--data.tokenizer=null",
        "--data.train.system_prompt=null", "--data.train.template", "None {question}", "--data.train.id_column=None",
    )  # fmt: skip
    data = found["data"]["init_args"]
    train = data["train"]["init_args"]
    assert (train["answer_column"], train["name"], data["tokenizer"]) == (None, None, None)
    assert (train["system_prompt"], train["template"], train["id_column"]) == ("null", "None {question}", "None")


def test_what_is_no_text_is_still_read(place: Place) -> None:
    found = parsed(
        place,
        "--data.train.path", "[a.jsonl, 'b c.jsonl']",
        "--data.train.limit=7", "--data.train.max_prompt_length", "null", "--data.train.weight=2",
        "--data.train.chat_template_kwargs", "{enable_thinking: false}",
        "--data.train.chat_template_kwargs.level=[1, 2]",
        "--data.selector=Posterior", "--data.train.glob", "true",
        "--model.sampling.num_generations=4", "--model.sampling", "{max_completion_length: 9}",
        "--trainer.max_steps=3", "--model.pass_at_k=[1, 2]",
    )  # fmt: skip
    data, model = found["data"]["init_args"], found["model"]["init_args"]
    train = data["train"]["init_args"]
    assert train["path"] == ["a.jsonl", "b c.jsonl"]
    assert (train["limit"], train["max_prompt_length"], train["weight"], train["glob"]) == (7, None, 2, True)
    assert train["chat_template_kwargs"] == {"enable_thinking": False, "level": [1, 2]}
    assert data["selector"]["class_path"] == "datamodules.selectors.Posterior"
    assert (model["sampling"]["num_generations"], model["sampling"]["max_completion_length"]) == (4, 9)
    assert model["pass_at_k"] == [1, 2]


def test_a_source_of_several_takes_options_by_name(place: Place) -> None:
    (place.path / "two.yaml").write_text(
        "data: {init_args: {train: {one: {class_path: datamodules.prompts.PromptFile, init_args: {path: pool.jsonl}}}}}"
    )
    code, out, err = place.run_with_output(
        "fit", "--config", "two.yaml", "--model.policy.path=x", "--data.train.one.template", "Q: {question}",
        "--data.train.one.limit", "5", "--print_config",
    )  # fmt: skip
    assert code == 0, err
    source = yaml.safe_load(out)["data"]["init_args"]["train"]["one"]["init_args"]
    assert (source["path"], source["template"], source["limit"]) == ("pool.jsonl", "Q: {question}", 5)
