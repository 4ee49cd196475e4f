"""Peak memory of this process, on the GPU where one is in use, else in main memory; and what running out looks like.

Never imports torch by itself: a process that has not imported it uses no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def peak_memory_bytes() -> int:
    """The most memory in use at once since the start or the last `reset_peak`, in bytes.

    With CUDA in use: what torch's allocator handed out, the maximum over this process's devices. Otherwise
    the peak resident set of the process.
    """
    return _cuda_peak() or _resident_peak()


def reset_peak() -> bool:
    """Start measuring anew.

    Returns:
        Whether that worked. Some containers forbid it for main memory: then the peak counts from the start.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets VmHWM: proc(5)
    except OSError:
        return False
    return True


def main_memory_bytes() -> int:
    """All main memory of this machine, whatever a container lets it use."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int | None:
    """Main memory in bytes: the machine's, or a container's limit where that is lower. None: unknown."""
    limits = []
    try:
        limits.append(main_memory_bytes())
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass  # No such limit, or the word "max".
    return min(limits, default=None)


def give_back_freed_memory() -> None:
    """Let the system have what this process has freed. On glibc; nothing happens elsewhere.

    The C library keeps freed memory for later, in pieces that a phase of other sizes cannot use: 16 rounds of PPO on a
    135M model grew from 2.1 to 3.2 GB by that alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory: CUDA's own error, or what its CPU allocator says."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    )


def _cuda_peak() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max((int(torch.cuda.max_memory_allocated(device)) for device in range(torch.cuda.device_count())), default=0)


def _resident_peak() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(size: int) -> str:
    """A size for people: `812 MB`, `3.4 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
