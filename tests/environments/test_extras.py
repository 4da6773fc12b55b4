"""Environments of packages that are not installed."""

import pytest

from app.environments import OpenEnv, Verifiers
from datamodules.errors import UserError
from datamodules.verifiers import VerifiersTasks


@pytest.mark.parametrize(
    ("made", "extra"),
    [(Verifiers, "verifiers"), (VerifiersTasks, "verifiers"), (OpenEnv, "openenv")],
)
def test_a_package_that_is_not_there_is_told_with_its_extra(made, extra, monkeypatch):
    monkeypatch.setattr("datamodules.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{extra} is not installed.*pip install -e '\.\[{extra}\]'"):
        made("http://localhost:8000")
