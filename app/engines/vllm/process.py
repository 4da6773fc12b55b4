"""Protects the trainer's process from the side effects of vLLM running in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore the environment variables and thread settings that vLLM changes when it starts.

    On a CPU vLLM replaces `torch.set_num_threads` with a function that does nothing, and adds libraries to
    `LD_PRELOAD`, which all later child processes would load. On a GPU it leaves torch with one thread.
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
    """Disable autograd, autocast and inference mode, as vLLM expects, and restore the global generators afterwards.

    Lightning validates in inference mode, where weights that are used later must not be written. Generation is called
    under the trainer's autocast, but an engine computes in its own dtype.
    """
    with isolate_rng(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
