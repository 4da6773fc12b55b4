"""How the page of a comparison looks."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito's colours, which people who see few colours tell apart, and three more; dashes tell the rest apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5af0", "#8c510a", "#b2182b")
_BASELINE = "#6b7280"
_PARTS = ("#6b7280", "#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#e69f00", "#c9ced6")

STYLE = """
:root { --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8; --paper: #ffffff; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a0a8b4; --line: #343a43; --paper: #15181d; --card: #1c2026; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1380px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 12px; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 16px; margin: 0 0 6px; }
.setting { color: var(--soft); margin: 0 0 6px; max-width: 110ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: normal; max-width: 8em; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 26px 0 12px; position: sticky; top: 0;
  background: var(--paper); padding: 8px 0; }
.legend label { display: flex; align-items: center; gap: 6px; cursor: pointer; }
.legend i { width: 22px; height: 0; border-top: 3px solid var(--own); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 18px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.tabs em { color: var(--soft); font-style: normal; margin-right: 6px; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { padding: 2px 9px; border-radius: 5px; color: var(--soft); cursor: pointer; font-size: 13.5px; }
.tabs > input:checked + label { background: var(--line); color: var(--ink); }
.tabs > input:focus-visible + label { outline: 2px solid var(--soft); }
.pane { display: none; margin-top: 8px; }
.tabs > input:nth-of-type(1):checked ~ .pane:nth-of-type(1),
.tabs > input:nth-of-type(2):checked ~ .pane:nth-of-type(2),
.tabs > input:nth-of-type(3):checked ~ .pane:nth-of-type(3),
.tabs > input:nth-of-type(4):checked ~ .pane:nth-of-type(4) { display: block; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
svg text.name { fill: var(--ink); font-size: 12.5px; }
.grid { stroke: var(--line); stroke-width: 1; }
.level line { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 5 4; opacity: 0.6; }
polyline { fill: none; stroke: var(--own); stroke-linejoin: round; }
.mean polyline { stroke-width: 2.6; }
.seed polyline { stroke-width: 1; opacity: 0.35; }
.seed circle { fill: var(--own); opacity: 0.35; }
.parts { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 8px 0 0; color: var(--soft); font-size: 13px; }
.parts i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px;
  background: var(--own); }
rect { fill: var(--own); }
details { margin: 4px 0; } summary { cursor: pointer; font-weight: 600; } code { font-size: 13px; }
.none { color: var(--soft); padding: 30px 0; }
"""


def arm_style(arms: Sequence[str], baseline: str) -> str:
    """A colour and a dash for every arm, and the rule that hides its curves when its box is empty."""
    others = [arm for arm in arms if arm != baseline]
    lines = []
    for place, arm in enumerate(arms):
        rank = 0 if arm == baseline else others.index(arm)
        color = _BASELINE if arm == baseline else _COLORS[rank % len(_COLORS)]
        dash = f" .arm-{place} polyline {{ stroke-dasharray: 7 3; }}" if rank >= len(_COLORS) else ""
        lines.append(
            f".arm-{place} {{ --own: {color}; }}{dash} "
            f"body:has(#arm-{place}:not(:checked)) g.arm-{place} {{ display: none; }}\n"
        )
    return "".join(lines)


def part_style(parts: int) -> str:
    """A colour for every part of a bar."""
    return "".join(f".part-{place} {{ --own: {_PARTS[place % len(_PARTS)]}; }}\n" for place in range(parts))
