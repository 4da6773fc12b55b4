"""What Linux offers to keep a process from doing harm: namespaces, a filter of system calls, Landlock. No packages."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (1 << bit for bit in (17, 26, 27, 28, 29, 30))
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
_MOUNT_SETATTR, _LANDLOCK = 442, 444  # of mount_setattr and the first of Landlock's three, on all machines
_CLONE3 = 435
_CAPSET, _CLONE, _PRLIMIT, _MACHINE = {
    "x86_64": (126, 56, 302, 0xC000003E),
    "aarch64": (91, 220, 261, 0xC00000B7),
}.get(platform.machine(), (0, 0, 0, 0))
_X32 = 0x40000000
"""Bit of the system calls of another convention, which would pass the filter under other numbers."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_ROOT = "/proc"
"""Where the view of the file system is built: a folder that is everywhere, and in which nothing lies that is shown."""


def _denied() -> tuple[int, ...]:
    """Return the system calls that programs may not make: processes, signals, others' memory, network, privileges."""
    common = (424, 425, 426, 427, 434, 438)  # pidfd_send_signal, io_uring_*, pidfd_open, pidfd_getfd
    if platform.machine() == "x86_64":
        # socket; fork, vfork, execve, execveat; kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo; ptrace,
        # process_vm_*, sched_setaffinity, setpriority; unshare, setns, mount, umount2, pivot_root, chroot;
        # bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl
        return (*common, 41, 57, 58, 59, 322, 62, 200, 234, 129, 297, 101, 310, 311, 203, 141, 272, 308, 165, 166,
                155, 161, 321, 298, 323, 248, 249, 250)  # fmt: skip
    return (*common, 198, 221, 281, 129, 130, 131, 138, 240, 117, 270, 271, 122, 140, 97, 268, 40, 39, 41, 51,
            280, 241, 282, 217, 218, 219)  # fmt: skip


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library. Raises OSError if it returns an error."""
    if _libc is None:
        raise OSError(f"{name} is for Linux only")
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options.encode())


def enter_namespaces(visible: Sequence[str]) -> None:
    """Enter namespaces without network, in which nothing but these files is there, read-only. Raises OSError."""
    for path in visible:
        if path.startswith("/tmp/"):
            raise OSError(f"{path} lies under /tmp, which is empty for every program")
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV)
    for path in (*visible, *_DEVICES):
        target = _ROOT + path
        if os.path.lexists(target) or not os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT))
        _mount(path, target, flags=_MS_BIND | _MS_REC)
    os.mkdir(f"{_ROOT}/tmp")
    read_only = struct.pack("4Q", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    at_recursive = 0x8000
    _call("syscall", _MOUNT_SETATTR, -100, _ROOT.encode(), at_recursive, read_only, ctypes.c_size_t(len(read_only)))
    os.chroot(_ROOT)
    os.chdir("/")


def enter_new_processes(size: int, files: int) -> None:
    """Have the next fork lead a process namespace, which dies with it, and mount an empty `/tmp` of this many bytes."""
    _call("unshare", _NEWPID | _NEWNS | _NEWIPC)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes={files},mode=700")


def hide_memory() -> None:
    """Keep other processes of the user from reading or tracing this one and its forks, where the system can do that."""
    if _libc is not None:
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of what descendants leave behind when they end, where the system can do that."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children() -> None:
    """Kill and reap all children, and the orphans that become children in their place."""
    me = os.getpid()
    while True:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{me}/children") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def give_up_rights(files: Sequence[str] | None) -> None:
    """Give up capabilities and most system calls, and all files but these, of which the last may be written.

    Args:
        files: paths; None where a view of the file system already restricts them.

    Raises:
        OSError: the system cannot do that.
    """
    if not _MACHINE:
        raise OSError(f"no filter of system calls is known for {platform.machine()}")
    _call("syscall", _CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if files is not None:
        _restrict_files(files)
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38  # EPERM, ENOSYS
    steps = [(load, 0, 0, 4), (equal, 1, 0, _MACHINE), (answer, 0, 0, refuse), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, _X32), (answer, 0, 0, refuse)]
    steps += [(equal, 0, 1, _CLONE3), (answer, 0, 0, unknown)]  # the C library then takes clone, whose flags are seen
    # Threads are allowed, and the limits of the process itself (0), by the first argument of these two.
    for number, allowed in ((_CLONE, (has_bit, 1, 0, 0x10000)), (_PRLIMIT, (equal, 1, 0, 0))):
        steps += [(equal, 0, 4, number), (load, 0, 0, 16), allowed, (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    steps += [step for number in _denied() for step in ((equal, 0, 1, number), (answer, 0, 0, refuse))]
    steps += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, 2, program, 0, 0)


def _restrict_files(paths: Sequence[str]) -> None:
    """Allow reading below these paths, and files in the last, with Landlock (Linux 5.13).

    No folders in it: a deep tree would take longer to remove than a program may run.
    """
    version = _call("syscall", _LANDLOCK, None, 0, 1)
    handled = {1: (1 << 13) - 1, 2: (1 << 14) - 1}.get(version, (1 << 15) - 1)
    rules = _call("syscall", _LANDLOCK, struct.pack("Q", handled), ctypes.c_size_t(8), 0)
    execute, write, read, read_folder, make_folder = 1, 2, 4, 8, 128
    for path in (*paths, *_DEVICES):
        if not os.path.exists(path):
            continue
        rights = execute | read | (read_folder if os.path.isdir(path) else write if path in _DEVICES else 0)
        rights = handled & ~make_folder if path == paths[-1] else rights
        file = os.open(path, os.O_PATH)
        _call("syscall", _LANDLOCK + 1, rules, 1, struct.pack("=Qi", rights, file), 0)
        os.close(file)
    _call("syscall", _LANDLOCK + 2, rules, 0)
    os.close(rules)
