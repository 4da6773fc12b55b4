"""What a claim to a folder removes when its run is a failed start."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.runs.ownership import OWNER, Claim, Owner


def test_a_failed_start_removes_its_own_folder_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    other = elsewhere / "runs" / "version_0" / "last.ckpt"
    other.parent.mkdir(parents=True)
    other.touch()
    here.mkdir()
    monkeypatch.chdir(here)
    claim = Claim(Path("runs/version_0"), Owner("a", "fit"))
    monkeypatch.chdir(elsewhere)
    claim.release(forget=True)
    assert list(here.iterdir()) == []
    assert other.exists()


def test_a_folder_that_was_there_keeps_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    Claim(tmp_path, Owner("a", "fit")).release(forget=True)
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]
    claim = Claim(tmp_path, Owner("a", "fit"))
    claim.release()
    before = (tmp_path / OWNER).read_text()
    Claim(tmp_path, Owner("b", "validate")).release(forget=True)
    assert (tmp_path / OWNER).read_text() == before
