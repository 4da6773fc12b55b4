"""TensorBoard's Custom Scalars page of a finished run, in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app.reporting.curves import read_scalars
from callbacks.watching.cockpit import CHARTS
from docs.pictures import picture_cockpit
from tests.support.browser import await_port, free_port
from tests.support.command import dots, fit_arguments, run_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cockpit")
    done = dots(*fit_arguments(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.long
def test_every_chart_shows_something_of_the_quickstart(finished: Path) -> None:
    logged = read_scalars(run_of(finished))
    for category, charts in CHARTS.items():
        for title, names in charts.items():
            missing = [name for name in names if not any(re.fullmatch(name, tag) for tag in logged)]
            # What uniform choice would have given is known only in runs that draw some prompts uniformly and see them.
            assert missing in ([], ["selection/uniform_informative_measured"]), (category, title)


@pytest.mark.long
def test_the_cockpit_opens_in_a_browser(finished: Path) -> None:
    text = picture_cockpit(finished, finished / "cockpit.png")
    assert all(category in text for category in CHARTS)
    assert (finished / "cockpit.png").stat().st_size > 20_000


@pytest.mark.long
def test_tensorboard_reads_the_layout(finished: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(port)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/custom_scalars/layout") as answer:
            layout = json.load(answer)
        assert {one["title"]: [chart["title"] for chart in one["chart"]] for one in layout["category"]} == {
            category: list(charts) for category, charts in CHARTS.items()
        }
    finally:
        server.terminate()
        server.wait(30)
