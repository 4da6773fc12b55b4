"""The report of `dots compare` on runs whose results are known."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from app.cli.dots import main
from app.studies.compare.command import report
from app.studies.compare.figures import _over_seeds, summarise
from app.studies.compare.records import read_comparison
from app.studies.compare.request import Arm
from app.studies.compare.run_folder import RunFolder
from app.studies.compare.tables import ratio_text
from datamodules.errors import UserError
from tests.support.compare_runs import comparison_of_two, finished_run, request, settings_of


@pytest.fixture
def figures(tmp_path: Path) -> dict:
    report(comparison_of_two(tmp_path), tmp_path)
    return json.loads((tmp_path / "compare.json").read_text())


def test_ratios_to_the_baseline_by_hand(figures: dict) -> None:
    fast = figures["arms"]["fast"]
    # To 0.8: 20 and 10 of 40 steps, each at half the cost of the baseline's.
    assert [one["ratio"] for one in fast["step_ratio"]["per_seed"].values()] == pytest.approx([0.5, 0.25])
    assert [one["ratio"] for one in fast["time_ratio"]["per_seed"].values()] == pytest.approx([0.25, 0.125])
    for name in ("time_ratio", "completion_ratio", "token_ratio"):
        assert fast[name]["mean"] == pytest.approx(math.sqrt(0.25 * 0.125))
        low, high = fast[name]["ci95"]
        # Of two logarithms ln 2 apart: half the width is 12.706 ln(2) / 2.
        assert math.log(high / low) == pytest.approx(12.7062 * math.log(2), rel=1e-5)
    assert (fast["time_ratio"]["reached"], fast["time_ratio"]["censored"]) == (2, 0)
    grpo = figures["arms"]["grpo"]
    assert grpo["time_ratio"]["mean"] == grpo["to_best"]["step_ratio"]["mean"] == 1.0
    assert grpo["time_ratio"]["ci95"] == [1.0, 1.0]


def test_intervals_of_accuracies_are_possible_ones() -> None:
    # Of 0.9 and 0.5: 0.7 +- 12.706 x 0.2.
    assert _over_seeds({0: 0.9, 1: 0.5})["ci95"] == pytest.approx([0.7 - 2.5412, 0.7 + 2.5412], abs=1e-3)
    assert _over_seeds({0: 0.9, 1: 0.5}, 0, 1)["ci95"] == [0, 1]
    assert _over_seeds({0: 0.7, 1: 0.7}, 0, 1)["ci95"] == pytest.approx([0.7, 0.7])


def test_what_came_out_by_hand(figures: dict) -> None:
    fast = figures["arms"]["fast"]
    assert fast["final_accuracy"]["mean"] == pytest.approx(0.9)
    assert fast["accuracy_gain"]["per_seed"] == {"0": pytest.approx(0.1), "1": pytest.approx(0.1)}
    assert fast["informative_fraction"]["mean"] == pytest.approx(0.8)
    assert fast["fresh_informative_fraction"]["mean"] == pytest.approx(0.7)
    assert fast["forecast_pearson"]["mean"] == pytest.approx(0.5)
    assert figures["arms"]["grpo"]["forecast_pearson"] == {"mean": None, "ci95": None, "per_seed": {}}
    assert fast["seconds"]["training"] == pytest.approx(0.5 * 10 * 40)
    assert fast["seconds"]["rollout"] == pytest.approx(0.5 * 40)
    assert fast["totals"]["completions"] == 0.5 * 256 * 40
    assert fast["totals"]["reference_completions"] == 64


def _completions(version: Path, step: int, groups: list[tuple[str, str, list[float], int]]) -> None:
    rows = [
        {"step": step, "prompt_id": prompt, "source": source, "correctness": one, "completion_tokens": tokens}
        for prompt, source, correctness, tokens in groups
        for one in correctness
    ]
    (version / "completions").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(version / "completions" / f"step_{step:06d}.parquet")


def test_what_perfect_choice_would_take_by_hand(tmp_path: Path) -> None:
    asked = comparison_of_two(tmp_path)
    report(asked, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text())["perfect_choice"]["time_ratio"]["mean"] is None
    assert "Perfect choice" not in (tmp_path / "compare.md").read_text() + (tmp_path / "compare.html").read_text()
    for seed in (0, 1):
        # 40 steps of 10 s each, of which the rollout takes 4.
        version = finished_run(tmp_path, "grpo", seed, [0.4, 0.5, 0.6, 0.7, 0.8], rollout_share=0.4)
        # Informative: 2 x 10 of the 2 x (10 + 5 + 15) tokens of step 0. A replayed group was rolled out elsewhere.
        _completions(version, 0, [("a", "fresh", [0, 1], 10), ("b", "fresh", [1, 1], 5), ("c", "fresh", [0, 0], 15)])
        # The same prompt in another step is another group: seed 0 has it informative too.
        _completions(version, 7, [("b", "fresh", [seed, 1], 30), ("d", "replay", [0, 1], 500)])
    report(asked, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())["perfect_choice"]
    assert found["informative_tokens"]["per_seed"] == {"0": pytest.approx(80 / 120), "1": pytest.approx(20 / 120)}
    expected = {"0": pytest.approx(1 - 0.4 / 3), "1": pytest.approx(1 - 0.4 * 5 / 6)}
    assert found["time_ratio"]["per_seed"] == expected
    assert "would take 0.77 [" in (tmp_path / "compare.md").read_text()
    assert "would take 0.77 [" in (tmp_path / "compare.html").read_text()
    (version / "completions" / "step_000007.parquet").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"step_000007\.parquet' is unreadable"):
        report(asked, tmp_path)


def test_the_setting_says_in_what_arms_differ(figures: dict) -> None:
    setting = figures["setting"]
    assert setting["baseline"] == "grpo" and setting["seeds"] == [0, 1] and setting["missing"] == []
    assert setting["differences"] == {"fast": ["data.init_args.selector: Uniform() -> Dots()"]}
    assert len(setting["machines"]) == 1 and setting["machines"][0]["processor"]


def test_the_page_in_words(tmp_path: Path, figures: dict) -> None:
    text = (tmp_path / "compare.md").read_text()
    assert "| fast | 0.18 [0.00, 14.45] | 0.18 [0.00, 14.45] | 0.18 [0.00, 14.45] | 0.35 [0.00, 28.90] |" in text
    assert "| fast | 0.25, 0.900 | 0.12, 0.900 |" in text
    assert "Budget: a training clock of the length of the baseline's run, at most 4 times trainer.max_steps." in text


class Tags(HTMLParser):
    """Collects the ids of elements and every address that a browser would fetch."""

    VOID = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_whole_and_asks_for_nothing(tmp_path: Path, figures: dict) -> None:
    text = (tmp_path / "compare.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    # Charts refer to their own markers, nothing else is referred to.
    assert all(address.startswith("#") for address in tags.addresses)
    namespaces = r' xmlns(:xlink)?="http://www.w3.org/(2000/svg|1999/xlink)"'
    assert not re.search(r"https?://|@import|url\((?!#)|<script", re.sub(namespaces, "", text))
    assert len(tags.ids) == len(set(tags.ids))
    assert {address[1:] for address in tags.addresses} <= set(tags.ids)
    # Four axes of accuracy with two runs of two arms each, and their means.
    assert len([one for one in tags.ids if re.fullmatch(r"arm-[01]-seed-[01]-accuracy-[0-3]", one)]) == 4 * 4
    # Accuracy four times, the informative fraction twice, the one forecast that was logged.
    assert len([one for one in tags.ids if one.startswith("arm-1-mean-")]) == 4 + 2 + 1
    assert text.count("No run logged this metric.") == 2
    assert "<title>fast seed 1</title>" in text and "<title>fast: rollout 0.50 s</title>" in text


def test_a_curve_goes_through_its_points(tmp_path: Path, figures: dict) -> None:
    text = (tmp_path / "compare.html").read_text()
    drawn = re.search(r'<g id="arm-0-seed-0-accuracy-0">.*?<path d="([^"]+)"', text, re.DOTALL)
    plane = re.search(r'<g id="plane-accuracy-0">.*?<path d="([^"]+)"', text, re.DOTALL)
    assert drawn and plane
    across, heights = zip(*points(drawn[1]), strict=True)
    left, right = (function(x for x, _ in points(plane[1])) for function in (min, max))
    # Equal distances in time and in accuracy, from the left border to the right one; upwards is smaller.
    assert across == pytest.approx([left + (right - left) * quarter / 4 for quarter in range(5)], abs=0.1)
    falls = [before - after for before, after in itertools.pairwise(heights)]
    assert falls == pytest.approx([falls[0]] * 4, abs=0.11) and falls[0] > 0


def points(path: str) -> list[tuple[float, float]]:
    """Corners of an SVG path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_the_page_opens_with_the_curves(tmp_path: Path, figures: dict) -> None:
    """Accuracy against the training clock stands before every other chart, sentence and table."""
    main = (tmp_path / "compare.html").read_text().partition("<main>")[2]
    first = main.index('id="plane-accuracy-0"')
    assert 'for="accuracy-0">time</label>' in main[:first]
    assert not re.search(r"<(p|table|h2)\b", main[:first]) and first < main.index("<table")


def test_the_picture_has_a_curve_of_each_arm(tmp_path: Path, figures: dict) -> None:
    pixels = imread(tmp_path / "compare.png")[..., :3]
    for color in ("#6b7280", "#0072b2"):  # of the baseline, of the other arm
        x = np.nonzero((np.abs(pixels - to_rgb(color)) < 0.01).all(axis=2).any(axis=0))[0]
        assert np.ptp(x) > 0.3 * pixels.shape[1], color


def test_an_arm_that_never_gets_there_is_shown(tmp_path: Path) -> None:
    asked = request("grpo slow")
    for seed in (0, 1):
        finished_run(tmp_path, "grpo", seed, [0.4, 0.5, 0.6, 0.7, 0.8])
    finished_run(tmp_path, "slow", 0, [0.4, 0.6, 0.8])
    finished_run(tmp_path, "slow", 1, [0.4, 0.5, 0.5])
    report(asked, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())["arms"]["slow"]["time_ratio"]
    assert found["mean"] == pytest.approx(0.5) and found["ci95"] is None and found["at_least"] is True
    assert found["per_seed"]["1"] == {"ratio": 0.5, "reached": False}
    assert ratio_text(found) == ">= 0.50 (1 of 2 reached)"
    assert "| slow | 0.50, 0.800 | > 0.50, 0.500 |" in (tmp_path / "compare.md").read_text()
    assert "&gt;= 0.50 (1 of 2 reached)" in (tmp_path / "compare.html").read_text()


def test_what_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = comparison_of_two(tmp_path)
    finished_run(tmp_path, "fast", 1, [0.4, 0.5], completed=False)
    replace(asked, seeds=(0, 1, 2)).save(tmp_path)
    main(["compare", "--report", str(tmp_path)])
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["setting"]["missing"] == ["grpo seed 2", "fast seed 1", "fast seed 2"]
    assert found["arms"]["fast"]["runs"] == 1
    assert found["arms"]["fast"]["time_ratio"]["ci95"] is None
    assert "fast seed 2" in (tmp_path / "compare.html").read_text()
    assert "not finished: fast seed 2" in capsys.readouterr().out


def test_runs_without_a_baseline_have_no_ratio(tmp_path: Path) -> None:
    finished_run(tmp_path, "fast", 0, [0.4, 0.8])
    figures = summarise(read_comparison(request(), tmp_path))
    assert list(figures["arms"]) == ["fast"]
    assert figures["arms"]["fast"]["time_ratio"]["mean"] is None
    report(request(), tmp_path)
    assert "| fast | - | - | - | - |" in (tmp_path / "compare.md").read_text()


def test_an_arm_alone_gets_its_accuracies_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = replace(request(), arms=request().arms[:1])
    assert [arm.name for arm in asked.arms] == ["grpo"]
    for seed, last in ((0, 0.6), (1, 0.8)):
        finished_run(tmp_path, "grpo", seed, [0.4, last])
    report(asked, tmp_path)
    text, html = (tmp_path / "compare.md").read_text(), (tmp_path / "compare.html").read_text()
    assert text.startswith("# grpo over 2 seeds\n") and "<h1>grpo over 2 seeds</h1>" in html
    assert "Means of ratios" not in text and "goal" not in text and "intervals are Student" in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["Results", "Seconds of a run"]
    # Ends of 0.6 and 0.8: half the width of the 95% interval is 12.706 * 0.1414 / sqrt(2), more than is possible.
    shown = capsys.readouterr().out
    assert "0.700 [0.000, 1.000]" in shown and "relative to" not in shown + text
    assert "Settings that differ" not in html + text


def test_different_held_out_prompts_are_refused(tmp_path: Path) -> None:
    finished_run(tmp_path, "grpo", 0, [0.4, 0.8])
    finished_run(tmp_path, "fast", 0, [0.4, 0.8], prompts="others")
    with pytest.raises(UserError, match="grpo and fast were evaluated on different prompts with seed 0"):
        read_comparison(request(), tmp_path)


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its 4 runs is finished"):
        read_comparison(request(), tmp_path)


def test_only_a_complete_summary_of_this_version_counts(tmp_path: Path) -> None:
    version = finished_run(tmp_path, "grpo", 0, [0.4, 0.8])
    folder = RunFolder.of(tmp_path, "grpo", 0)
    found = folder.summary()
    assert found is not None and found.evaluations[-1].accuracy == 0.8
    (version / "summary.json").write_text('{"completed": true, "steps": 20}')
    with pytest.raises(UserError, match="is not the summary of a run of this version"):
        folder.summary()
    (version / "summary.json").unlink()
    assert folder.summary() is None


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    folder, arm = RunFolder(tmp_path), Arm("fast", ())
    folder.check(request(), arm, settings_of("Uniform"))
    folder.prepare(request(), arm, settings_of("Uniform"))
    folder.check(request(), arm, settings_of("Uniform"))
    with pytest.raises(UserError, match=r"other settings: .*Uniform -> datamodules.selectors.Dots. Give another --out"):
        folder.check(request(), arm, settings_of("Dots"))
    with pytest.raises(UserError, match=r"other settings: is_baseline: False -> True"):
        folder.check(request(), Arm("grpo", ()), settings_of("Uniform"))


def test_only_a_run_without_checkpoints_is_cleared(tmp_path: Path) -> None:
    version = finished_run(tmp_path, "grpo", 0, [0.4, 0.8], completed=False)
    folder, arm = RunFolder.of(tmp_path, "grpo", 0), Arm("grpo", ())
    assert version == folder.version and folder.summary() is None
    (version / "checkpoints").mkdir()
    (version / "checkpoints" / "step_00000003.ckpt").write_bytes(b"")
    folder.prepare(request(), arm, settings_of("Uniform"))
    assert version.exists()
    (version / "checkpoints" / "step_00000003.ckpt").unlink()
    folder.prepare(request(), arm, settings_of("Uniform"))
    assert not version.exists()
