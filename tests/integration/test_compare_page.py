"""The page of `dots compare` in a real browser, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.studies.compare.command import report
from tests.support.browser import browser
from tests.support.compare_runs import comparison_of_two

pytestmark = pytest.mark.slow

SHOWN = "return [...document.querySelectorAll('#{0} ~ .pane')].map(e => getComputedStyle(e).display)"


def test_the_page_draws_its_curves_and_asks_for_nothing(tmp_path: Path) -> None:
    report(comparison_of_two(tmp_path), tmp_path)
    page = tmp_path / "compare.html"
    with browser() as window:
        window.open(page.as_uri())
        assert window.requests() == [page.as_uri()]
        assert window.run("return document.title") == "What it takes to match grpo"
        window.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000

        # The goal is drawn where the baseline's last point is, and the faster arm is there earlier.
        line, left, right, grpo, fast = window.run(
            """
            const box = e => e.getBoundingClientRect();
            const level = box(document.querySelector('#level-accuracy-0 path')).top;
            const plane = box(document.querySelector('#plane-accuracy-0 path'));
            const ends = ['#arm-0-seed-0-accuracy-0', '#arm-1-seed-0-accuracy-0'].map(name => {
                const dots = [...document.querySelectorAll(name + ' use')].map(box);
                const there = dots.find(dot => dot.top + dot.height / 2 <= level + 1);
                return there.left + there.width / 2;
            });
            return [level, plane.left, plane.right, ...ends];
            """
        )
        assert line > 0
        assert grpo == pytest.approx(right, abs=1)
        assert (fast - left) / (grpo - left) == pytest.approx(0.25, abs=0.01)

        # Another axis is one click away, and only it is shown.
        assert window.run(SHOWN.format("accuracy-0")) == ["block", "none", "none", "none"]
        window.run("document.querySelector('label[for=accuracy-3]').click()")
        assert window.run(SHOWN.format("accuracy-0")) == ["none", "none", "none", "block"]

        # An arm that is unticked disappears from every chart; the other stays.
        visible = """
            const curves = [...document.querySelectorAll('g[id^="arm-{0}-"]')];
            return [...new Set(curves.map(e => getComputedStyle(e).display))];
        """
        window.run("document.querySelector('#arm-1').click()")
        assert window.run(visible.replace("{0}", "1")) == ["none"]
        assert window.run(visible.replace("{0}", "0")) == ["inline"]
        assert window.errors() == []
