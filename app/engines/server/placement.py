"""Which GPUs a run's own servers get."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch

from datamodules.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Return the name of each GPU that this process sees, in torch's order, as `CUDA_VISIBLE_DEVICES` lists it."""
    count, given = torch.cuda.device_count(), os.environ.get(VISIBLE)
    names = map(str, range(count)) if given is None else (one.strip() for one in given.split(","))
    return list(names)[:count]


def server_gpus(devices: Sequence[int | str] | None, size: int, training: Collection[int]) -> list[str | None]:
    """Return the `CUDA_VISIBLE_DEVICES` of each server; None leaves it as it is here.

    Args:
        devices: GPUs of all servers: indices of those that this process sees, or UUIDs. None starts one server: on the
            first GPUs that no training process uses, or with training on what is there where none is left.
        size: GPUs of a server.
        training: indices of the GPUs that training processes of this machine use.

    Raises:
        UserError: a GPU doesn't exist, is named twice or is used for training, or `devices` are not whole servers.
    """
    visible = visible_gpus()
    if devices is None:
        free = [name for index, name in enumerate(visible) if index not in training]
        return [",".join(free[:size]) if training and len(free) >= size else None]
    if not devices or len(devices) % size:
        raise UserError(
            f"server.devices names {len(devices)} GPUs, expected a multiple of server.tensor_parallel_size, which is "
            f"{size}. Change one of them."
        )
    names: list[str] = []
    for device in devices:
        index = _index(device, visible)
        if index is not None and not 0 <= index < len(visible):
            seen = f"the GPUs 0 to {len(visible) - 1}" if visible else "no GPU"
            given = f" ({VISIBLE}={os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
            raise UserError(f"server.devices names GPU {device}, but torch sees {seen} here{given}. Change it.")
        if index in training:
            raise UserError(
                f"server.devices names GPU {device}, on which a training process runs: trainer.devices uses "
                f"{', '.join(map(str, sorted(training)))}. Give servers and training different GPUs."
            )
        name = str(device) if index is None else visible[index]
        if name in names:
            raise UserError(f"server.devices names GPU {device} twice. Name it once.")
        names.append(name)
    return [",".join(names[start : start + size]) for start in range(0, len(names), size)]


def _index(device: int | str, visible: Sequence[str]) -> int | None:
    """Return the index of a GPU, which may not exist; None for a UUID that is none of those that are visible."""
    if isinstance(device, int) or device.isdigit():
        return int(device)
    if not device.startswith(("GPU-", "MIG-")):
        raise UserError(f"server.devices has {device!r}, expected an index such as 1, or a UUID (GPU-...). Change it.")
    for index, name in enumerate(visible):
        of_torch = name if name.startswith(("GPU-", "MIG-")) else f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        if of_torch.startswith(device) or device.startswith(of_torch):  # CUDA accepts the first characters of one
            return index
    return None
