"""Make the pictures of the pages again from real runs: `python -m docs.pictures [RUN [COMPARISON [CALCULATOR]]]`.

They are the curves of a run of the quickstart, a screenshot of TensorBoard's cockpit, for which chromium and
chromedriver must be installed, the two accuracies of `make compare`, and the curves of `make calculator`. Folders that
are not given are made first, which takes minutes. `images/words_and_sums.png` and `calculator_compare.png` are of
comparisons that take longer (docs/results.md, docs/environments.md), and `images/step.svg` was drawn by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from callbacks.watching.cockpit import CHARTS
from tests.support.browser import await_port, browser, free_port

IMAGES = Path(__file__).parent / "images"
# Polymer and Angular keep most of the page in shadow trees.
TEXT = """
const texts = [];
const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
};
walk(document.body);
return texts.join(' ');
"""
"""A script that returns the text of TensorBoard's page."""


def picture_cockpit(run: Path, out: Path) -> str:
    """Write a screenshot of the Custom Scalars of a run as TensorBoard shows them, and return the text of the page."""
    port, first = free_port(), json.dumps(next(iter(CHARTS["What teaches"])))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(port)
        with browser() as window:
            window.open(f"http://127.0.0.1:{port}/#custom_scalars")
            window.until(f"const text = (() => {{{TEXT}}})(); return text.includes({first})", timeout=120)
            window.screenshot(out, width=1500, height=1300)
            text: str = window.run(TEXT)
            return text
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    """Write the pictures."""
    with TemporaryDirectory() as folder:
        run, comparison = Path(folder, "quickstart", "version_0"), Path(folder, "compare")
        calculator = Path(folder, "calculator", "version_0")
        given = [Path(one) for one in sys.argv[1:]]
        if given:
            run = given[0]
        else:
            make("quickstart", f"--trainer.logger.save_dir={folder}")
        if len(given) > 1:
            comparison = given[1]
        else:
            make("compare", f"--out {comparison}")
        if len(given) > 2:
            calculator = given[2]
        else:
            make("calculator", f"--trainer.logger.save_dir={folder}")
        shutil.copy(calculator / "curves.png", IMAGES / "calculator_curves.png")
        shutil.copy(comparison / "compare.png", IMAGES / "quickstart_compare.png")
        shutil.copy(run / "curves.png", IMAGES / "quickstart_curves.png")
        picture_cockpit(run, IMAGES / "quickstart_cockpit.png")


def make(target: str, options: str) -> None:
    """Run a target of the Makefile with further options."""
    subprocess.run(["make", target, f"ARGS={options}"], cwd=IMAGES.parents[1], check=True)


if __name__ == "__main__":
    main()
