"""Every line of the documentation that installs something resolves."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.test_packaging import EXTRAS, ROOT

SOURCES = [
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.*ml")), *sorted(ROOT.glob("*.md")),
    ROOT / "Dockerfile", ROOT / "constraints.txt", ROOT / "constraints-gpu.txt", ROOT / "pyproject.toml",
    *(one for folder in ("app", "callbacks", "datamodules") for one in sorted((ROOT / folder).rglob("*.py"))),
]  # fmt: skip
PIP = re.compile(r"pip install ((?:(?:-c [\w-]+\.txt|-e (?:'\.\[[\w,-]+\]'|\.)|--[\w-]+)\s*)+|\w[\w-]*)")
MAKE = re.compile(r"(?:^|`)make (install|quickstart|smollm|vllm-cpu|vllm|docs|pages)\b", re.MULTILINE)


def pip_lines() -> list[str]:
    """Return what is given to `pip install` anywhere."""
    texts = (one.read_text() for one in SOURCES)
    return sorted({" ".join(found.split()) for text in texts for found in PIP.findall(text)})


def make_lines() -> list[str]:
    return sorted({found for one in SOURCES if one.suffix == ".md" for found in MAKE.findall(one.read_text())})


def test_lines_are_found() -> None:
    assert {"-c constraints.txt -e '.[lora,encoder]'", "-c constraints-gpu.txt -e '.[gpu]'", "peft"} <= set(pip_lines())
    assert {"install", "vllm", "vllm-cpu"} <= set(make_lines())


@pytest.mark.parametrize("line", pip_lines())
def test_a_line_names_what_there_is(line: str) -> None:
    words = shlex.split(line)
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option == "-c":
            assert (ROOT / value).is_file()
    for word in words:
        if word.startswith("."):
            assert set(Requirement(f"dots{word[1:]}").extras) <= EXTRAS.keys()
        # The project is not on PyPI: whoever takes its name there could have it installed.
        assert "dots-grpo" not in word


@pytest.mark.parametrize("target", make_lines())
def test_a_target_has_its_steps(target: str) -> None:
    dry = ["make", "--dry-run", "--always-make", target]
    steps = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" in steps
    for constraints in re.findall(r" -c (\S+\.txt)", steps):
        assert (ROOT / constraints).is_file() or constraints == ".venv/constraints-vllm.txt"


def test_the_image_installs_as_documented() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    instructions = [one for one in text.splitlines() if one and not one.startswith("#")]
    assert {one.split()[0] for one in instructions} == {"FROM", "RUN", "ENV", "COPY", "WORKDIR", "ENTRYPOINT"}
    assert re.match(r"FROM nvidia/cuda:13\.0", instructions[0])
    assert "-c constraints-gpu.txt -e '.[gpu]'" in text
    for one in instructions:
        if one.startswith("RUN"):
            subprocess.run(["sh", "-n", "-c", one.removeprefix("RUN ")], check=True)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not os.environ.get("DOTS_TEST_NETWORK"), reason="set DOTS_TEST_NETWORK=1: it asks PyPI")
def test_every_line_resolves(tmp_path: Path) -> None:
    """By uv, which reads metadata alone, where pip would download gigabytes."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "uv"], check=True)
    subprocess.run([tmp_path / "uv/bin/pip", "install", "--quiet", "uv"], check=True)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    resolved = {}
    for line in {*pip_lines(), "-c constraints.txt -e '.[dev,lora,encoder]'", "-c constraints.txt -e '.[docs]'"}:
        arguments, words = [], iter(shlex.split(line))
        for word in words:
            if word == "-c":
                arguments += ["--constraint", str(ROOT / next(words))]
            elif word != "-e" and not word.startswith("--"):
                file = tmp_path / "wanted.txt"
                file.write_text(word.replace(".", "dots-grpo", 1) + f" @ {ROOT.as_uri()}" if word[0] == "." else word)
                arguments.append(str(file))
        for python in ("3.11.7", "3.12"):
            done = subprocess.run(
                [tmp_path / "uv/bin/uv", "pip", "compile", "--quiet", *arguments, "--python-version", python,
                 "--python-platform", "x86_64-manylinux_2_28"],
                capture_output=True, text=True, env=plain,
            )  # fmt: skip
            resolved[line, python] = done.stderr[-1000:] if done.returncode else "resolved"
    assert set(resolved.values()) == {"resolved"}, resolved
