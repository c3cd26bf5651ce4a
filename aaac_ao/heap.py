"""The C library's heap: by itself glibc keeps what is freed, in pieces that other tensors do not fit in.

So does MKL with the buffers of its matrix products.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
#: Tensors from this size on are mapped.
_LARGE = 384 << 10
#: Pieces of the heap that are kept from use; None before `map_large_tensors`, and where there is no glibc.
_holes: list[int] | None = None


def map_large_tensors() -> None:
    """From now on let glibc map tensors of 384 KiB and more, which go back to the system when they are freed.

    By itself it soon keeps all that is freed below 32 MiB for later. Smaller tensors stay in its heap, as pages cost
    time whenever they are new.
    """
    global _holes
    if not all(hasattr(_LIBC, name) for name in ("mallopt", "malloc_trim", "sbrk")):
        return
    _LIBC.malloc.argtypes, _LIBC.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    _LIBC.free.argtypes, _LIBC.free.restype = [ctypes.c_void_p], None
    _LIBC.sbrk.argtypes, _LIBC.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 4 << 20)  # else it gives back the top of the heap with every free
    _holes = [] if _holes is None else _holes
    hand_back_memory()


def hand_back_memory() -> None:
    """Let glibc and MKL give freed memory back to the system; nothing happens before the first `map_large_tensors`.

    Large free pieces of the heap, which it would use before it maps anything, are taken out. Nothing is written there,
    so that they are addresses and no memory.
    """
    if _holes is None:
        return
    _free_mkl_buffers()()
    while _holes:
        _LIBC.free(_holes.pop())
    _LIBC.malloc_trim(0)
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    for size in (_LARGE << shift for shift in reversed(range(9))):
        while (piece := _from_hole(size - 4096)) is not None:
            _holes.append(piece)
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGE)


@functools.cache
def _free_mkl_buffers() -> Callable[[], object]:
    """MKL's function for it, if it is linked into torch: with AVX-512 the buffers come to some 9 MB."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.mkl_serv_free_buffers
    except (OSError, AttributeError):
        return lambda: None


def _from_hole(size: int) -> int | None:
    """A free piece of the heap, or None if it would have to grow."""
    end = _LIBC.sbrk(0)
    piece = _LIBC.malloc(size)
    if piece is not None and piece < end and _LIBC.sbrk(0) == end:
        return piece
    _LIBC.free(piece)
    return None
