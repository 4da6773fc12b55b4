"""Keeps the trainer's process as it was around an engine that lives in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def process_restored() -> Iterator[None]:
    """Puts back what vLLM changes in the process that it starts in: environment variables and threads.

    On a CPU vLLM replaces `torch.set_num_threads` by a function that does nothing, and adds libraries to `LD_PRELOAD`,
    which every process started later would load; on a GPU it leaves torch with one thread.
    """
    environment = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast and no inference mode, as vLLM expects to find them; global generators are put back.

    Lightning validates in inference mode, in which no weight that is used later may be written; and generation is
    called under the trainer's autocast, while an engine computes in its own dtype.
    """
    with isolate_rng(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
