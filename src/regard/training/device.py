"""The machine that a training runs on: its device, its memory, its random generators."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from regard import __version__
from regard.errors import RunError

NO_ROOM = ("not enough memory", "out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc",
           "could not create a primitive")
"""What torch says when memory has run out, where it has no exception of its own for it; the last is oneDNN's."""


def pick_device(name: str) -> torch.device:
    """The device a config asks for; "auto" takes a GPU where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RunError('train.device = "cuda", but torch sees no GPU here. Use "auto" or "cpu", or install a torch '
                       "with CUDA")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def versions() -> dict[str, str]:
    """What made a checkpoint: versions and the kind of machine."""
    return {"regard": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on a GPU or beside it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in NO_ROOM)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn memory that runs out where nothing can be parted into an error that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"memory does not hold {what}. What was saved before is whole. Use a smaller model, or a "
                       "machine with more memory") from None


def seed(*numbers: int) -> None:
    """Have what is drawn from here on be a function of these numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def free_memory(device: torch.device) -> int:
    """Bytes that a training could still take."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + held
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):  # no Linux: what is in use cannot be known
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (file := Path(limit)).is_file() and (text := file.read_text().strip()).isdigit():
            free = min(free, int(text) - taken_memory(device))
    return free


def taken_memory(device: torch.device) -> int:
    """Bytes that this process holds (of a GPU: what its tensors do)."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(device)


def reset_peak(device: torch.device) -> None:
    """Have `peak_memory` tell the highest from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # no Linux: the peak is then that of the whole process, which is never less
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most since `reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
