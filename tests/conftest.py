"""Settings of every test: few threads, no network, and nothing inherited from the caller's shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch, tokenizers and the hub client are imported: they read these once.
# Two programs of two threads each on two cores slow one another down tenfold: a parallel worker has one thread. It is
# set outright there, because a worker inherits what the controlling process has set for itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.pop("DOTS_DEBUG", None)

import pytest  # noqa: E402  the environment above has to be set first
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _forget_modules_of_temporary_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's module that one test has imported hides the file of that name in the folder of the next."""
    before = set(sys.modules)
    yield
    base = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(base):
            del sys.modules[name]
