"""The front door: the `dots` command, its trainer and its error lines. Importing this loads no heavy library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.cli.entry import main

if TYPE_CHECKING:
    from app.cli.dots import DotsCLI
    from app.cli.trainer import DotsTrainer

__all__ = ["DotsCLI", "DotsTrainer", "main"]


def __getattr__(name: str) -> Any:
    if name == "DotsTrainer":
        from app.cli.trainer import DotsTrainer

        return DotsTrainer
    if name == "DotsCLI":
        from app.cli.dots import DotsCLI

        return DotsCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
