"""What each process holds of a policy that is cut over n of them is its n-th part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.support.command import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
PARAMETERS = 134_515_008
"""Of SmolLM2-135M, by hand: 49152 x 576 + 30 x (576 x (2 x 576 + 2 x 192 + 3 x 1536) + 2 x 576) + 576."""


def held(config: LlamaConfig, ranks: int, folder: Path) -> list[dict[str, int]]:
    """Bytes by kind, of every process."""
    config.save_pretrained(folder)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}
    command = [sys.executable, "-m", "tests.support.sharded_memory", str(folder)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | address | {"RANK": str(rank), "WORLD_SIZE": str(ranks)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return [json.loads(process.communicate(timeout=280)[0]) for process in processes]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_falls_as_one_over_n(ranks: int, tmp_path: Path):
    for one in held(SMOLLM2, ranks, tmp_path):
        share = 4 * PARAMETERS / ranks
        assert one["parameters"] == pytest.approx(share, rel=0.15)
        assert one["gradients"] == pytest.approx(share, rel=0.15)
        assert one["optimizer"] == pytest.approx(2 * share, rel=0.15)
