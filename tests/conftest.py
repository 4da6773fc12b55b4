"""Settings of every test: few threads, no network, and nothing inherited from the caller's shell."""

from __future__ import annotations

import os

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

import torch  # noqa: E402  the environment above has to be set first

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
