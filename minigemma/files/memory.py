"""The memory limit of this process, so that a model that does not fit is refused before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

SCRATCH = 300_000_000  # bytes that a run takes besides weights and cache: Python, Numba, a chunk of a prompt
CGROUP = Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Bytes that this process may use: the least of memory, control group and `ulimit -v`; 0 if unknown."""
    limits = [_cgroup("memory.max"), _cgroup("memory/memory.limit_in_bytes"), _address_space()]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit > 0), default=0)


def fits_memory(weights: int, cache: int = 0) -> bool:
    """Is there room for weights and cache, in bytes, and scratch?"""
    limit = memory_limit()
    return not limit or weights + cache + SCRATCH <= limit


def check_memory(name: str, weights: int, cache: int = 0) -> None:
    """Raise ValueError with the numbers if weights and cache, in bytes, and scratch are more than the limit."""
    if not fits_memory(weights, cache):
        limit, needed = memory_limit(), weights + cache + SCRATCH
        weights_gb, cache_gb, needed_gb, limit_gb = (bytes / 1e9 for bytes in (weights, cache, needed, limit))
        raise ValueError(
            f"{name} needs {weights_gb:,.1f} GB of weights + {cache_gb:,.1f} GB of cache + {SCRATCH / 1e9:,.1f} GB to "
            f"work in = {needed_gb:,.1f} GB, and there are {limit_gb:,.1f} GB; "
            "use --dtype int8 or int4, a shorter context (-c), or --force (force=True)"
        )


def _cgroup(name: str) -> int:
    """A limit of this process's control group, version 2 or 1; 0 if there is none."""
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) < 1 << 60 else 0


def _address_space() -> int:
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft if soft != resource.RLIM_INFINITY else 0
