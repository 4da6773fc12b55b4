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
        line, grpo, fast = window.run(
            """
            const box = e => e.getBoundingClientRect();
            const pane = document.querySelector('#accuracy-0 ~ .pane');
            const level = box(pane.querySelector('.level line')).top;
            const ends = ['.arm-0.seed', '.arm-1.seed'].map(name => {
                const dots = [...pane.querySelector(name).querySelectorAll('circle')].map(box);
                const there = dots.find(dot => dot.top + dot.height / 2 <= level + 1);
                return there.left + there.width / 2;
            });
            return [level, ...ends];
            """
        )
        left, right = window.run(
            "const b = document.querySelector('#accuracy-0 ~ .pane .grid').getBoundingClientRect();"
            "return [b.left, b.right]"
        )
        assert line > 0
        assert grpo == pytest.approx(right, abs=1)
        assert (fast - left) / (grpo - left) == pytest.approx(0.25, abs=0.01)

        # Another axis is one click away, and only it is shown.
        assert window.run(SHOWN.format("accuracy-0")) == ["block", "none", "none", "none"]
        window.run("document.querySelector('label[for=accuracy-3]').click()")
        assert window.run(SHOWN.format("accuracy-0")) == ["none", "none", "none", "block"]

        # An arm that is unticked disappears from every chart; the other stays.
        visible = "return getComputedStyle(document.querySelector('g.arm-{0}')).display"
        window.run("document.querySelector('#arm-1').click()")
        assert window.run(visible.format(1)) == "none"
        assert window.run(visible.format(0)) != "none"
        assert window.errors() == []
