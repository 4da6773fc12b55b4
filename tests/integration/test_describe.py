"""The published setting, looked at without its GPUs or weights."""

from __future__ import annotations

import pytest

from tests.support.command import dots


def test_the_published_setting_prints_its_table():
    done = dots(
        *("describe", "--config", "configs/paper/dots/base.yaml"),
        *("--config", "configs/paper/dots/qwen2.5_math_1.5b_deepscaler.yaml"),
        *("--model.policy.path", "tests/fixtures/qwen2.5_math_1.5b"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines() if len(cells := _cells(line)) == 3}
    # Qwen2.5-1.5B: embedding 151936 x 1536 (tied); per layer q and o 1536^2 each, k and v 1536 x 256 each, their
    # biases 1536 + 256 + 256, three 1536 x 8960 matrices and two norms of 1536; one final norm.
    layer = 2 * 1536**2 + 2 * 1536 * 256 + 1536 + 512 + 3 * 1536 * 8960 + 2 * 1536
    assert rows["policy parameters"][1] == f"{151936 * 1536 + 28 * layer + 1536:,}"
    assert rows["prompts per step"] == ["64", "512"]
    assert rows["rolled out"] == ["32", "256"]
    assert rows["completions per step"] == ["512", "4,096"]
    assert rows["completion tokens generated, at most"] == [f"{256 * 3072:,}", f"{2048 * 3072:,}"]
    assert rows["reference completions, every 2"] == ["256", "2,048"]
    # Worked by hand: float32 weights and gradients, two moments as wide as both.
    size = 4 * (151936 * 1536 + 28 * layer + 1536) / 2**30
    assert rows["parameters"] == rows["gradients"] == [f"{size:.2f} GiB", "always"]
    assert rows["optimizer state"] == [f"{2 * size:.2f} GiB", "always"]
    held = {name: cells for name, cells in rows.items() if cells[0].endswith("GiB")}
    total, phase = held.pop("estimated memory, prompts of 1,024 tokens")
    parts = [float(cells[0].removesuffix(" GiB")) for cells in held.values() if cells[1] in ("always", phase)]
    assert float(total.removesuffix(" GiB")) == pytest.approx(sum(parts), abs=0.005 * len(parts))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]
