"""How a process that trains on CPUs keeps the memory it has freed."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc reuse freed memory where JAX can only run on CPUs; returns whether it does now.

    XLA's CPU backend allocates the temporaries of every step anew, hundreds of megabytes, and
    glibc takes such sizes from the kernel and gives them back each time: every page of every step
    begins with a page fault. Kept in one heap they cost nothing (docs/performance.md has numbers),
    at the price of some fragmentation. It has to be called before JAX starts its threads, which
    would get heaps of their own. Elsewhere, and under another C library, nothing changes.
    """
    if not sys.platform.startswith("linux") or _may_have_accelerators():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])


def _may_have_accelerators():
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
