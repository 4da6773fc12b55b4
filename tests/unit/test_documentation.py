"""The pages say nothing that the program does not know: generated pages, YAML blocks, commands, names of anything."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from jsonargparse import ArgumentError

import app.engines
import app.rewards
import callbacks
import datamodules.selectors
from app.cli.commands import COMMANDS
from app.cli.entry import WHOLE_ANSWERS, expand
from app.cli.parsing import DotsArgumentParser
from datamodules.metric_names import METRIC_NAMES, metric_name
from docs.generate import CLASSES, DOCS, command_parser, study_help, subcommands
from tests.support.command import logged
from tests.support.refusal import Place

ROOT = DOCS.parent
PAGES = sorted(
    [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "arms" / "README.md"]
)
BASE = """
trainer: {}
model:
  class_path: app.module.GRPOModule
  init_args: {policy: {path: configs/tiny_policy}, rewards: [{class_path: app.rewards.Numeric}]}
data:
  class_path: datamodules.online.OnlinePromptDataModule
  init_args: {train: {class_path: datamodules.prompts.PromptFile, init_args: {path: my_prompts.jsonl}}}
"""
"""What an overlay on a page is laid over."""
OTHER_PROGRAMS = ("tensorboard", "pip", "export", "cd", "sbatch", "openssl", "for", "done", "docker")
MADE_UP = ("run.yaml", "my_run.yaml", "subset.yaml")
"""Configs of the reader; here each holds `BASE`."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.title or self.text.strip().splitlines()[0][:40]}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for language, title, text in re.findall(
            r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if language in languages:
                found.append(Block(str(page.relative_to(ROOT)), language, title, text))
    return found


@pytest.fixture(scope="module")
def parser() -> DotsArgumentParser:
    built = command_parser()
    for one in [built, *subcommands(built).values()]:
        one.exit_on_error = False
    return built


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a reader of the pages has: a clone's configs, and the files that the pages tell to write."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in MADE_UP:
        (tmp_path / name).write_text(BASE)
    saved = tmp_path / "runs" / "my_run" / "version_0"
    saved.mkdir(parents=True)
    (saved / "config.yaml").write_text(BASE)
    quick = tmp_path / "runs" / "quickstart" / "version_0"
    quick.mkdir(parents=True)
    (quick / "config.yaml").write_text(BASE)
    for block in blocks("python"):
        if block.title.startswith("my_"):
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_generated_pages_are_up_to_date() -> None:
    """In a new process: the help of an option names the classes that are imported, and tests import more."""
    done = subprocess.run([sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_block_of_yaml_is_a_config(block: Block, parser: DotsArgumentParser, reader: Path) -> None:
    (reader / "base.yaml").write_text(BASE)
    (reader / "block.yaml").write_text(block.text)
    whole = {"model", "data"} <= yaml.safe_load(block.text).keys()
    base = [] if whole else ["--config", "base.yaml"]
    found = parser.parse_args(["fit", *base, "--config", "block.yaml"])
    assert found.fit.model.class_path == "app.module.GRPOModule"


def test_a_wrong_block_is_found(parser: DotsArgumentParser, reader: Path) -> None:
    (reader / "block.yaml").write_text(BASE.replace("path: my_prompts.jsonl", "paht: my_prompts.jsonl"))
    with pytest.raises(ArgumentError, match="paht"):
        parser.parse_args(["fit", "--config", "block.yaml"])


def commands() -> list[tuple[str, list[str]]]:
    """Return page and words of every command on the pages."""
    found = []
    for block in blocks("bash"):
        text = re.sub(r"\\\n\s*", " ", block.text)
        names = dict(re.findall(r"^(\w+)=(.+?)\s*(?:#.*)?$", text, re.MULTILINE))
        for line in text.splitlines():
            for name in re.findall(r"\$(\w+)", line):
                line = line.replace(f"${name}", names.get(name, "0").strip('"'))
            for name in re.findall(r"\$(\w+)", line):  # names may hold names
                line = line.replace(f"${name}", names.get(name, "0").strip('"'))
            words = shlex.split(line, comments=True)
            if words and not (len(words) == 1 and "=" in words[0]):
                found.append((block.page, words))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda one: " ".join(one)[:60] if isinstance(one, list) else one
)
def test_a_command_is_one(
    page: str, words: list[str], parser: DotsArgumentParser, reader: Path, monkeypatch: Any
) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {one for one in rest if "=" not in one} <= set(targets)
    elif program == "torchrun":
        parse(rest[rest.index("-m") + 2 :], parser)
    elif program.endswith(("python", "python3")):
        assert rest[0] == "-m"
        assert (ROOT / (rest[1].replace(".", "/") + ".py")).exists()
    elif program in ("dots", ".venv/bin/dots"):
        if "../lora/run.yaml" in rest or (page == "docs/examples.md" and rest[:2] == ["fit", "--config"]):
            monkeypatch.chdir(reader / "examples" / "math")
        parse(rest, parser)
    else:
        assert Path(program).name in OTHER_PROGRAMS, f"{page}: {program}"


def parse(words: list[str], parser: DotsArgumentParser) -> None:
    """Parse a command line without running it."""
    words = expand(words)
    if words[0] in COMMANDS:
        known = set(re.findall(r"--\w+", study_help(words[0])))
        assert {one.partition(".")[0] for one in words if one.startswith("--")} <= known
        return
    # These the command takes out before it parses.
    words = [one for one in words if one not in ("...", "--dry_run", WHOLE_ANSWERS)]
    if "--config" not in words:
        words += ["--config", "run.yaml"]
    parser.parse_args(words)


def test_the_code_of_the_guides_trains(reader: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The reader's own reward, class, selector and callback, together in the config of the first page."""
    place = Place.at(reader, monkeypatch, capfd)
    (page,) = [block.text for block in blocks("yaml") if block.page == "docs/index.md"]
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
    (reader / "my_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reader / "first.yaml").write_text(page)
    found = "[{class_path: app.rewards.Function, init_args: {path: my_rewards.is_right}}, my_classes.Length]"
    small = ["--model.policy.path", "configs/tiny_policy", "--model.sampling.max_completion_length", "4",
             "--data.prompts_per_step", "4", "--trainer.accelerator", "cpu", "--data.cache_dir", "cache"]  # fmt: skip
    code, said = place.run(
        "fit", "--config", "first.yaml", *small, "--trainer.max_steps", "2", "--model.rewards", found,
        "--data.selector", "my_selectors.LeastSeen", "--trainer.callbacks+=my_callbacks.Longest",
    )  # fmt: skip
    assert code == 0, said[-2000:]
    run = reader / "lightning_logs" / "version_0"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["OnlinePromptDataModule"]["selector"]
    assert state["seen"].tolist() == [1.0] * 8  # two steps of four: those seen least came first
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert max(logged(run)["my/longest"].values()) > 0 and "rewards/length/mean" in logged(run)


CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
METRIC_FOLDERS = {entry.name.partition("/")[0] for entry in METRIC_NAMES if "/" in entry.name}
PLACES = ("configs/", "docs/", "tests/", "app/", "callbacks/", "datamodules/", "examples/")
SHORT_NAMES = {
    *app.rewards.__all__, *app.engines.__all__, *callbacks.__all__, *datamodules.selectors.__all__,
    "PromptFile", "Procedural", "GRPOModule", "DotsTrainer",
}  # fmt: skip


def spans() -> Iterator[tuple[str, str]]:
    """Yield page and text of every piece of code within a sentence."""
    for page in PAGES:
        if page.name not in ("cli.md", "config.md", "CHANGELOG.md"):
            text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
            yield from ((str(page.relative_to(ROOT)), one) for one in CODE.findall(text))


def option_names(parser: DotsArgumentParser) -> set[str]:
    names = parser.option_names()
    prefixes = {"app.module.GRPOModule": "model.", "datamodules.online.OnlinePromptDataModule": "data."}
    for _, classes in CLASSES.values():
        for path in classes:
            of_class = {one.removeprefix("no_") for one in parser.of_class(path).option_names()}
            names |= of_class | {prefixes.get(path, "") + one for one in of_class}
    return names | {f"model.engine.{one}" for one in parser.of_class("app.engines.VllmServer").option_names()}


def test_no_page_names_an_option_that_does_not_exist(parser: DotsArgumentParser) -> None:
    known = option_names(parser) | {
        f"trainer.{one}" for one in ("strategy.init_args.sharded_checkpoints", "callbacks.init_args.compute_dtype")
    }
    known |= {f"model.{one}" for one in ("policy.lora.rank", "val_sampling", "policy.lora")} | {"debug"}
    for name in COMMANDS:
        known |= {one[2:] for one in re.findall(r"--\w+", study_help(name))}
    for prefix in ("model.", "data."):
        known |= {one.removeprefix(prefix) for one in known if one.startswith(prefix)}
    known |= {
        "max-restarts",
        "node-rank",
        "local-addr",
        "rdzv-backend",
        "rdzv-conf",
        "rdzv-endpoint",
        "rdzv-id",
    }  # torchrun
    # Of SLURM, tests.benchmarks.throughput and vLLM's server.
    known |= {"signal", "requeue", "against", "enable-scale-out"}
    wrong = [
        (page, found)
        for page, text in spans()
        for found in re.findall(r"(?:^|\s)--([\w.-]+)", text)
        if found.rstrip(".") not in known and not any(one.startswith(f"{found.rstrip('.')}.") for one in known)
    ]
    assert not wrong
    dotted = [
        (page, text)
        for page, text in spans()
        if re.fullmatch(r"(trainer|model|data)(\.\w+)+", text)
        and text not in known
        and not any(one.startswith(f"{text}.") for one in known)
    ]
    assert not dotted


def test_no_page_names_a_file_that_does_not_exist() -> None:
    wrong = [
        (page, text)
        for page, text in spans()
        if text.startswith(PLACES) and re.fullmatch(r"[\w./*-]+", text) and not list(ROOT.glob(text.rstrip("/")))
    ]
    assert not wrong


def test_no_page_names_a_class_that_does_not_exist() -> None:
    wrong = []
    for page, text in spans():
        if re.fullmatch(r"(app|callbacks|datamodules)(\.\w+)+", text):
            try:
                resolve_name(text)
            except (ImportError, AttributeError):
                wrong.append((page, text))
        elif (
            re.fullmatch(r"(?:rewards|selectors|engines|callbacks)\.[A-Z]\w+|[A-Z][a-z]+(?:[A-Z][a-z]+)*", text)
            and text.rpartition(".")[2] not in SHORT_NAMES
            and not text.endswith("Environment")  # Lightning's
        ):
            wrong.append((page, text))
    assert not wrong


def test_no_page_names_a_metric_that_does_not_exist() -> None:
    wrong = [
        (page, text)
        for page, text in spans()
        if page != "docs/metrics.md"
        and re.fullmatch(r"[a-z_]+/[\w@*/]+", text)
        and text.partition("/")[0] in METRIC_FOLDERS
        and not text.startswith("completions/*")
        and metric_name(text) is None
    ]
    assert not [one for one in wrong if one[1] not in ("completions/predict.parquet",)]


OF_OTHERS = {
    "my_function", "print_config", "private_test_cases",
    "my_prompts", "maths", "my_experiment", "my_policy", "three_seeds", "nLetter", "dsr1209_pass_rates",  # the reader's
    "tracking_uri", "experiment_name", "sqlite", "log_softmax", "load_from_checkpoint", "TorchElasticEnvironment",
    "LightningEnvironment", "SLURMEnvironment", "eth0", "rdzv", "c10d", "endpoint", "conf", "is_host", "addr",
    "use_liger_kernel",
}  # fmt: skip
"""Words of the reader, or of other programs."""


def test_every_word_of_code_in_a_sentence_is_one_of_the_program() -> None:
    """An option, key, file, metric, class or function that is misspelt or gone is found, whatever its kind."""
    folders = ("app", "callbacks", "datamodules", "examples", "configs", "tests/benchmarks", "tests/support")
    files = [one for folder in folders for one in (ROOT / folder).rglob("*") if one.suffix in (".py", ".yaml", ".sh")]
    files += [ROOT / name for name in ("pyproject.toml", "Makefile", "mkdocs.yml", "constraints.txt")]
    listed = [str(one) for folder in ("docs", "examples", "tests") for one in (ROOT / folder).rglob("*")]
    known = set(re.findall(r"\w+", "\n".join([one.read_text() for one in files] + list(map(str, files)) + listed)))
    known |= {one.stem for one in ROOT.iterdir()} | {"ipynb"} | OF_OTHERS
    wrong = {
        (page, word)
        for page, text in spans()
        for word in re.findall(r"[^\W\d]\w{3,}", text)
        if word not in known and not word.isupper()  # a variable of the environment, or a place to fill
    }
    assert not wrong


def test_the_code_of_the_pages_imports_what_exists() -> None:
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("app", "callbacks", "datamodules")):
                for one in node.names:
                    assert resolve_name(f"{node.module}:{one.name}"), block


def test_no_page_names_a_target_that_does_not_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for _, text in spans() if text.startswith("make ") for word in text.split()[1:] if "=" not in word}
    assert named <= targets


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r": (\w+\.md)$", text, re.MULTILINE))


def test_pages_load_nothing_from_the_network() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False and not {"extra_css", "extra_javascript"} & config.keys()
    assert not [page for page in PAGES if re.search(r"!\[[^\]]*\]\(https?:|<script|<img[^>]+https?:", page.read_text())]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def message_texts() -> list[str]:
    """Return every text of the sources, as one piece where it is written in several, "..." in place of what varies."""
    found = []
    for file in (one for folder in ("app", "callbacks", "datamodules") for one in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "..." for one in node.values)
                found.append("".join(map(str, parts)))
    return found


def test_errors_that_are_shown_exist() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    shown = [one for row in rows for one in CODE.findall(row) if metric_name(one) is None]
    assert len(shown) > 10
    texts = message_texts()

    def exists(line: str) -> bool:
        pattern = re.compile(".*".join(map(re.escape, line.split(" ... "))), re.DOTALL)
        return any(pattern.search(text) for text in texts)

    assert [one for one in shown if not exists(one)] == []
    assert not exists("is made of ... cheese")
