"""What users set in the environment: which kernels run, and where files are kept."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import FileError

LAYERS = ("tbb", "omp", "workqueue")  # the thread pools of Numba, the best first (kernels/parallel.py)


class SettingError(FileError):
    """An environment variable that cannot be used; `path` is NAME=value."""


def setting(name: str, values: Iterable[str]) -> str:
    """An environment variable, or "" where it is not set; SettingError for none of these values."""
    value = os.environ.get(name, "")
    if value and value not in values:
        raise SettingError(f"{name}={value}", f"it is none of {', '.join(values)}", "set one of these, or unset it")
    return value


def check_numba() -> None:
    """SettingError for what Numba refuses when it is imported, without saying where it stands."""
    setting("NUMBA_THREADING_LAYER", ("default", "safe", "threadsafe", "forksafe", *LAYERS))
    setting("NUMBA_OPT", ("0", "1", "2", "3", "max"))
    threads = os.environ.get("NUMBA_NUM_THREADS", "1").strip()
    if not threads.isdecimal() or int(threads) < 1:
        why = "it must be a whole number, 1 or more"
        raise SettingError(f"NUMBA_NUM_THREADS={threads}", why, "unset it for one thread a core")


def cache_folder() -> Path:
    """$MINIGEMMA_CACHE, else $XDG_CACHE_HOME/minigemma, else ~/.cache/minigemma."""
    own = os.environ.get("MINIGEMMA_CACHE")
    common = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(own or os.path.join(common, "minigemma")))
