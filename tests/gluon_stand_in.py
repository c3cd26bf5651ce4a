"""Stands in for Gluon, so that Triton's interpreter runs `kernels/pairs.py`: layouts mean nothing on a CPU.

What layouts decide on a device is checked elsewhere: `convert_layout(assert_trivial=True)` when the kernel is compiled,
and everything else by the check against the portable twin before the first use.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

import numpy as np
import ptx
import triton
import triton.language as tl

from aaac_ao.kernels import lut


class SharedMemory:
    """What `allocate_shared_memory` returns; the last one stored to is what `ld.shared` reads."""

    words: np.ndarray | None = None

    def store(self, value) -> None:
        SharedMemory.words = np.ascontiguousarray(value.handle.data).view(np.uint32).reshape(-1)

    def _keep_alive(self) -> None:
        pass


def _call(name: str):
    """The function of `tl` of this name, looked up when called: the interpreter replaces it while a kernel runs."""
    return lambda *args, **options: getattr(tl, name)(*args, **options)


def _without_layout(name: str, count: int):
    return lambda *args: getattr(tl, name)(*args[:count])


def language() -> types.ModuleType:
    """A module with the part of Gluon's language that the kernel uses."""
    gl = types.ModuleType("triton.experimental.gluon.language")
    same = ("load", "store", "where", "minimum", "maximum", "max", "expand_dims", "join", "cdiv", "program_id")
    vars(gl).update({name: _call(name) for name in (*same, "num_programs", "zeros_like")})
    gl.static_range = range
    for name in ("bfloat16", "float16", "float32", "int8", "int16", "int32", "int64"):
        setattr(gl, name, getattr(tl, name))
    gl.pointer_type = tl.pointer_type
    gl.arange, gl.zeros = _without_layout("arange", 2), _without_layout("zeros", 2)
    gl.inline_asm_elementwise = lambda *args, **options: ptx.inline_asm_elementwise(
        *args, **options, shared=SharedMemory.words
    )
    gl.convert_layout = lambda value, layout, assert_trivial=False: value
    gl.allocate_shared_memory = lambda dtype, shape, layout: SharedMemory()
    gl.thread_barrier = lambda: None
    for name in ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMADistributedLayout", "DotOperandLayout"):
        setattr(gl, name, lambda *args, **options: None)
    return gl


def mma_v2(a, b, total):
    """The product on tensor cores; bf16 goes in as fp32, as in `kernels.lut.DOT_DTYPE`."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


GLUON = "triton.experimental.gluon"


def load_pairs(folder: str):
    """The module `aaac_ao.kernels.pairs` on this stand-in, from a copy in `folder` with constants spelled in `tl`."""
    source = pathlib.Path(importlib.util.find_spec("aaac_ao.kernels").origin).with_name("pairs.py").read_text()
    source = source.replace("= gl.constexpr(", "= (").replace("gl.constexpr", "tl.constexpr")
    # the real Gluon may have been imported already, and then is an attribute of its package
    source = source.replace("from triton.experimental import gluon", f'import sys\n\ngluon = sys.modules["{GLUON}"]')
    source = source.replace("from .assembly", "import triton.language as tl\n\nfrom aaac_ao.kernels.assembly")
    copy = pathlib.Path(folder) / "pairs.py"
    copy.write_text(source)
    gluon, ampere = types.ModuleType("triton.experimental.gluon"), types.ModuleType("ampere")
    gluon.jit, gluon.language, ampere.mma_v2 = triton.jit, language(), mma_v2
    stand_ins = {
        GLUON: gluon,
        f"{GLUON}.language": gluon.language,
        f"{GLUON}.language.nvidia": types.ModuleType("nvidia"),
        f"{GLUON}.language.nvidia.ampere": ampere,
    }
    kept = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location("pairs_on_stand_in", copy)
        pairs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pairs)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    pairs.scale_x = lut.scale_x  # products of bf16 that the interpreter gets right
    return pairs
