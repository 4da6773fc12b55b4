"""A run on two hosts, started by torchrun, is the run of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command import dots, run_of
from tests.integration.hosts import Host, torchrun, two_hosts
from tests.integration.test_ranks import arguments, assert_same_choices_and_updates, succeeded

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.long, pytest.mark.timeout(900)]

ACROSS = ("--trainer.num_nodes=2",)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeeded([dots(*arguments(folder, 1, strategy=None))])
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_on_each_host(hosts: tuple[Host, Host], alone: Path, tmp_path: Path, strategy: str) -> None:
    succeeded(torchrun(hosts, tmp_path, *arguments(tmp_path, 1, *ACROSS, strategy=strategy)))
    assert_same_choices_and_updates(tmp_path, alone)
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["completed"] is True
