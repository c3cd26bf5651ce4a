"""The C libraries of this folder, compiled when the package is installed and loaded through ctypes."""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_warned: list[Path] = []


def load(name: str) -> ctypes.CDLL | None:
    """A library by its name in pyproject.toml, or None, after one warning for all of them.

    Args:
        name: without folder and suffix.
    """
    path = FOLDER / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = f"cannot be loaded ({error})" if path.exists() else "is missing"
    if FOLDER not in _warned:
        _warned.append(FOLDER)
        logger.warning(
            "the C library %s of aaac_ao %s: on the CPU, linear layers decode their weights at every call, which is up "
            "to a hundred times slower, and second-order rounding takes about five times longer and loses a little "
            "more, as it goes without annealing. Install a C compiler (gcc or clang), then reinstall aaac_ao: pip "
            "install --force-reinstall --no-deps aaac_ao (or -e . in its repository)",
            name,
            reason,
        )
    return None
