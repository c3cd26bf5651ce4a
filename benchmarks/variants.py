"""What `benchmarks.linear` times: ways to compute x W^T, each over enough copies of W to stream from memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import aaac_ao
from aaac_ao import AAACTensor
from aaac_ao.formats import load_scale
from aaac_ao.packing import TILE_ROWS, unpack
from benchmarks.shapes import bytes_of, random_weight
from benchmarks.timing import Call, copies_for

Product = Callable[[torch.Tensor], torch.Tensor]
#: Arithmetic that the CPU kernel offers, by the names `aaac_ao.cpu_mode` takes.
CPU_MODES = ("exact", "int16", "int8")
#: Rows of W over which an error is taken.
ERROR_ROWS = 256


@dataclass
class Variant:
    """One way to compute x W^T.

    Attributes:
        name: as the tables have it.
        products: y from x, one function for each copy of W.
        dtype: of x.
        weight_bytes: bytes of one copy that a product must read: codes and scales.
        exact: rows [start, stop) of W as stored, in fp64; start is a multiple of 16.
        labels: further columns of the result, such as the mode.
        context: makes the context manager that a call runs in.
    """

    name: str
    products: list[Product]
    dtype: torch.dtype
    weight_bytes: int
    exact: Callable[[int, int], torch.Tensor]
    labels: dict[str, str] = field(default_factory=dict)
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def calls(self, x: torch.Tensor) -> list[Call]:
        """The products of x, ready to be timed."""
        x = x.to(self.dtype)
        return [lambda product=product: product(x) for product in self.products]

    def warm(self, x: torch.Tensor) -> None:
        """Use every copy once: what a kernel does on first sight of a weight, such as packing, is not timed."""
        with self.context():
            for call in self.calls(x):
                call()

    def errors(self, x: torch.Tensor, out_features: int) -> dict[str, float]:
        """Relative error of y against fp64 on the stored weight, and what rounding x to bf16 alone would give.

        Both are Frobenius norms over the last `ERROR_ROWS` rows of W.
        """
        start = max(0, out_features - ERROR_ROWS) // TILE_ROWS * TILE_ROWS
        w = self.exact(start, out_features)
        with self.context():
            y = self.products[-1](x.to(self.dtype))[..., start:].double()
        true = x.double() @ w.t()
        rounded = x.bfloat16().double() @ w.t()
        return {"error": relative(y, true), "error_of_bf16_x": relative(rounded, true)}


def relative(y: torch.Tensor, true: torch.Tensor) -> float:
    """|y - true| / |true| in Frobenius norms."""
    return (torch.linalg.vector_norm(y - true) / torch.linalg.vector_norm(true)).item()


def copies(tensors: tuple, cold_bytes: int) -> list[tuple]:
    """`tensors`, and as many copies of them as stream from memory in rotation; what is no tensor is shared."""
    plain = [t for t in tensors if isinstance(t, torch.Tensor)]
    more = copies_for(bytes_of(*plain), cold_bytes) - 1
    return [tensors, *(tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in tensors) for _ in range(more))]


def dense(name: str, w: torch.Tensor, cold_bytes: int) -> Variant:
    """`F.linear` with W in its own dtype."""
    products = [lambda x, c=c: F.linear(x, c) for (c,) in copies((w,), cold_bytes)]
    return Variant(name, products, w.dtype, bytes_of(w), lambda start, stop: w[start:stop].double())


def aaac(n: int, k: int, fmt: str, group_size: int, device: str, dtype: torch.dtype, cold_bytes: int) -> list[Variant]:
    """`aaac_ao::linear` on random weights [n, k]; on a CPU in every mode that is there, on the same copies."""
    weight = random_weight(n, k, fmt, group_size, device, dtype)
    parts = (weight.qdata, weight.scale, weight.codebooks, weight.per_tensor_scale, group_size)
    stored = copies(parts, cold_bytes)
    products = [lambda x, c=c: torch.ops.aaac_ao.linear(x, *c, None) for c in stored]
    size = bytes_of(weight.qdata, weight.scale)
    name = f"{fmt} g{group_size}"
    return [
        Variant(
            " ".join(filter(None, ("AAAC", name, mode))),
            products,
            dtype,
            size,
            lambda start, stop: exact_rows(weight, start, stop),
            {"format": name, "mode": mode or "default"},
            mode_context(mode),
        )
        for mode in modes(device)
    ]


def modes(device: str) -> tuple[str | None, ...]:
    """Modes to time: those of `aaac_ao.cpu_mode` on a CPU; None is the only one elsewhere."""
    return CPU_MODES if device == "cpu" else (None,)


def mode_context(mode: str | None) -> Callable[[], contextlib.AbstractContextManager]:
    """What makes the context manager of a mode."""
    return contextlib.nullcontext if mode is None else lambda: aaac_ao.cpu_mode(mode)


def exact_rows(weight: AAACTensor, start: int, stop: int) -> torch.Tensor:
    """The definition of the format in fp64, rows [start, stop) of [N, K]; start is a multiple of 16."""
    qdata, k = weight.qdata[start // TILE_ROWS : -(-stop // TILE_ROWS)], weight.in_features
    codes = unpack(qdata, stop - start, k).long()
    magnitude, selector = load_scale(weight.scale[start:stop])
    magnitude, selector = (t.repeat_interleave(weight.group_size, 1)[:, :k] for t in (magnitude, selector))
    w = magnitude.double() * weight.codebooks.double()[selector.long(), codes]
    return w if weight.per_tensor_scale is None else w * weight.per_tensor_scale.double()
