"""Make the pictures of the pages again from a run of the quickstart: `python -m docs.pictures [RUN_FOLDER]`.

Without a run folder the quickstart is trained first, which takes minutes. Written are its curves and a screenshot of
TensorBoard's cockpit, for which chromium and chromedriver must be installed. `images/words_and_sums.png` is a part of
the page of a `dots compare` that takes hours (docs/results.md), and `images/step.svg` was drawn by hand.
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
        run = Path(sys.argv[1]) if sys.argv[1:] else Path(folder, "quickstart", "version_0")
        if not sys.argv[1:]:
            command = ["fit", "--config", "configs/quickstart.yaml", f"--trainer.logger.save_dir={folder}"]
            subprocess.run([sys.executable, "-m", "app", *command], cwd=IMAGES.parents[1], check=True)
        shutil.copy(run / "curves.png", IMAGES / "quickstart_curves.png")
        picture_cockpit(run, IMAGES / "quickstart_cockpit.png")


if __name__ == "__main__":
    main()
