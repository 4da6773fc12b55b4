"""Peak memory of log-probabilities at a real vocabulary, forward and backward, each path in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKENS, VOCABULARY, HIDDEN = int(os.environ.get("DOTS_MEMORY_TOKENS", "8192")), 151_936, 896
SHARE = 0.15

_PROGRAM = """
import resource, sys
import torch
from app.objective.logprobs import token_logprobs

path, tokens, vocabulary, width = sys.argv[1], *map(int, sys.argv[2:])
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
weight = torch.randn(vocabulary, width, generator=generator).mul_(0.02).requires_grad_()
targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if path == "tiled":
    logprobs, _ = token_logprobs(hidden, weight, targets)
else:
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
logprobs.sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, float(logprobs.detach().double().sum()), float(hidden.grad.double().norm()))
"""


def run(path: str) -> tuple[float, float, float]:
    """MiB above the inputs, sum of log-probabilities, norm of the hidden states' gradient."""
    sizes = (str(TOKENS), str(VOCABULARY), str(HIDDEN))
    done = subprocess.run([sys.executable, "-c", _PROGRAM, path, *sizes], capture_output=True, text=True, check=True)
    kib, total, norm = map(float, done.stdout.split())
    return kib / 1024, total, norm


def available() -> int:
    """Return the bytes available without swapping, according to Linux."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_small_share_of_the_plain_path() -> None:
    if available() < 4 * TOKENS * VOCABULARY * 4:
        pytest.skip(f"the plain path needs about {4 * TOKENS * VOCABULARY * 4 / 2**30:.0f} GiB")
    tiled, plain = run("tiled"), run("plain")
    print(f"\n{TOKENS} tokens: {tiled[0]:,.0f} MiB of {plain[0]:,.0f}, {tiled[0] / plain[0]:.1%}")
    assert tiled[1:] == pytest.approx(plain[1:], rel=1e-4)
    assert tiled[0] <= SHARE * plain[0]
