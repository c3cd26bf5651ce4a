"""The C library's heap: by itself glibc keeps what is freed, in pieces that other tensors do not fit in."""

from __future__ import annotations

import ctypes
import sys

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
#: Tensors from this size on are mapped.
_LARGE = 1 << 20
_sparing = False


def map_large_tensors() -> None:
    """From now on let glibc map tensors of 1 MiB and more, which go back to the system when they are freed.

    By itself it soon keeps all that is freed below 32 MiB for later. Smaller tensors stay in its heap, as pages cost
    time whenever they are new.
    """
    global _sparing
    if not all(hasattr(_LIBC, name) for name in ("mallopt", "malloc_trim", "sbrk")):
        return
    _sparing = True
    _LIBC.malloc_trim(0)
    _fill_holes()
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 4 << 20)  # else it gives back the top of the heap with every free


def hand_back_memory() -> None:
    """Let glibc give freed memory back to the system; nothing happens before the first `map_large_tensors`."""
    if _sparing:
        _LIBC.malloc_trim(0)


def _fill_holes() -> None:
    """Take large free pieces out of the heap, which would be used before anything is mapped.

    Nothing is written there, so that they take addresses and no memory.
    """
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    _LIBC.malloc.argtypes, _LIBC.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    _LIBC.free.argtypes, _LIBC.free.restype = [ctypes.c_void_p], None
    _LIBC.sbrk.argtypes, _LIBC.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    for size in (_LARGE << shift for shift in reversed(range(9))):
        while True:
            end = _LIBC.sbrk(0)
            piece = _LIBC.malloc(size - 4096)
            if piece is None or piece > end or _LIBC.sbrk(0) != end:  # not from a hole
                _LIBC.free(piece)
                break
