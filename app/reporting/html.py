"""Pages that need neither scripts nor a network, and charts for them."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

SVG_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, which the page's style colours
    "font.size": 9,
    "axes.edgecolor": "#9aa3ae",
    "xtick.color": "#9aa3ae",
    "ytick.color": "#9aa3ae",
    "grid.color": "#9aa3ae",
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""Settings of matplotlib under which the charts of a page are drawn and saved."""


def render(template: Path, **values: Any) -> str:
    """Return the page of a template, which extends `base.html.jinja`; all values are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(values)


def svg_of(figure: Figure, key: str) -> str:
    """Save a chart as an `<svg>` element, to be drawn under `SVG_STYLE`; `key` tells the charts of a page apart."""
    buffer = StringIO()
    # Ids of markers and clip paths are hashes: one salt per chart, so that no chart refers to one that is hidden.
    with matplotlib.rc_context({"svg.hashsalt": key}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    # Ids that matplotlib numbers would repeat from chart to chart.
    return re.sub(r'<g id="[A-Za-z0-9.]+_\d+"', "<g", svg[svg.index("<svg") :])
