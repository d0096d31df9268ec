"""The C library's heap: what it keeps of the memory that was freed, and what it gives back to the system."""

import ctypes
import platform

GLIBC = platform.libc_ver()[0] == "glibc"
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX = -3, -1, -8  # of glibc's malloc.h


def keep_freed(most: int, arenas: int = 0) -> None:
    """From now on, have the heap keep what is freed, in pieces of up to so many bytes. Every step of a training or a
    search asks for the same again, and pages that come anew from the system are faulted in one by one: 5% of a search,
    a third of a plain training loop. It holds for the whole process.

    Args:
        most: bytes; what is larger goes back to the system.
        arenas: parts that the heap has at most, each with what it keeps; 0: as the library finds best.
    """
    if GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, most)
        libc.mallopt(M_TRIM_THRESHOLD, min(8 * most, 2**31 - 1))
        if arenas:
            libc.mallopt(M_ARENA_MAX, arenas)


def give_back() -> None:
    """Give back to the system what is free now, also between what is in use."""
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
