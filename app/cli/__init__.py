"""The front door: the `dots` command, its trainer and its error lines."""

from app.cli.dots import DotsCLI, main
from app.cli.trainer import DotsTrainer

__all__ = ["DotsCLI", "DotsTrainer", "main"]
