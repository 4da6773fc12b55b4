"""The script of `dots completion bash`, read by bash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from app.cli.commands import COMMANDS, LIGHTNING_COMMANDS
from tests.support.refusal import Place


def completed(script: Path, typed: str) -> set[str]:
    """Return what bash offers after `typed`, whose last word is completed."""
    words = typed.split(" ")
    quoted = " ".join(f"'{one}'" for one in words)
    asked = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_dots; "
    asked += r"""printf '%s\n' "${COMPREPLY[@]}" """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
    return {one.strip() for one in done.stdout.splitlines() if one.strip()}


def test_bash_completes_subcommands_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place.at(tmp_path, monkeypatch, capfd)
    code, out, said = place.run_with_output("completion", "bash")
    assert code == 0, said
    script = tmp_path / "dots.bash"
    script.write_text(out)
    assert completed(script, "dots fi") == {"fit"}
    assert completed(script, "dots ") >= {*LIGHTNING_COMMANDS, *COMMANDS}
    assert completed(script, "dots fit --model.policy.pa") == {"--model.policy.path"}
    assert completed(script, "dots fit --dr") == {"--dry_run"}
    assert completed(script, "dots fit --trainer.max_s") == {"--trainer.max_steps"}
    assert completed(script, "dots fit --data.train.templ") == {"--data.train.template"}
    assert completed(script, "dots export --ad") == {"--adapter"}
    assert completed(script, "dots data --data.val_s") == {"--data.val_size"}
    assert completed(script, "dots init --rew") == {"--reward"}
    assert completed(script, "dots compare --see") == {"--seeds"}
    assert completed(script, "dots difficulty fit --outc") == {"--outcomes"}
    assert "pool.jsonl" in completed(script, "dots init --data po")
    code, out, said = place.run_with_output("completion", "zsh")
    assert code == 0 and out.startswith("#compdef dots") and "--model.policy.path" in out
    assert "shell 'fish' does not exist" in place.refused("completion", "fish")
