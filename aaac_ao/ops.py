"""`aaac_ao::linear` and `aaac_ao::dequantize`: torch.library ops on plain tensors.

No subclass crosses these schemas, so they compile, export and differentiate like any other op. With N out_features and
K in_features, all of them take the stored parts of an `AAACTensor`:

    qdata             uint8 [ceil(N / 16), ceil(K / 64) * 512], see `packing`
    scale             bf16 or float8_e4m3fn [N, ceil(K / group_size)]; its sign bit selects the book
    codebooks         bf16 [2, 16]
    per_tensor_scale  fp32 0-D, or None

The weight is w[n, k] = per_tensor_scale * |scale| * codebooks[sign bit of scale][code]. On the CPU a compiled kernel
multiplies by the stored bytes (see `cpu_mode`). Where it is missing or not the fastest, the weight is decoded to fp32
in chunks of rows, so that a call never holds more than about 32 MB beyond its inputs and its result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from aaac_ao.formats import load_scale
from aaac_ao.packing import TILE_COLUMNS, TILE_ROWS, bytes_of_rows, ceil_div, natural_bytes, packed_shape

#: Decoded weights held at a time on the CPU; with all temporaries about 12 bytes each.
CHUNK_WEIGHTS = 1 << 20
#: Input elements converted to fp32, and fp32 results held, at a time on the CPU.
CHUNK_INPUTS = 1 << 20
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_cpu_mode = ContextVar("aaac_ao_cpu_mode", default="int16")


@functools.cache
def _cpu():
    from aaac_ao.kernels import cpu

    return cpu


def cpu_mode(mode: str) -> contextlib.AbstractContextManager[None]:
    """A context in which `aaac_ao::linear` on the CPU uses another arithmetic.

    - "int16", the default outside of any context: inputs as integers of 15 or 16 bits with a scale for every 16 or 8
      of them, books as 14-bit ones. The error is about 1e-4 of the output, a tenth of what rounding the inputs to bf16
      costs.
    - "int8": 7 or 8 bits for the inputs, 8 for the books; the error is about 1e-2. Faster.
    - "exact": fp32.

    The mode is that of the thread that calls the op, when it is called: a compiled model follows it without being
    compiled anew. Enter the context around compiled code, not inside of it. Without AVX2, and in layers that the kernel
    does not take, every mode is exact.

    Raises:
        ValueError: an unknown mode.
    """
    modes = _cpu().MODES
    if mode not in modes:
        raise ValueError(f"cpu_mode must be one of {', '.join(modes)}, got {mode!r}")
    return _set_cpu_mode(mode)


@contextlib.contextmanager
def _set_cpu_mode(mode: str) -> Iterator[None]:
    token = _cpu_mode.set(mode)
    try:
        yield
    finally:
        _cpu_mode.reset(token)


# Defined by hand, as the wrappers that `torch.library.custom_op` puts around a kernel take longer than its checks.
torch.library.define(
    "aaac_ao::linear",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor codebooks, Tensor? per_tensor_scale, int group_size, Tensor? bias, "
    "Tensor? act_pre_scale=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "aaac_ao::dequantize",
    "(Tensor qdata, Tensor scale, Tensor codebooks, Tensor? per_tensor_scale, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
    act_pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer y = x W^T + bias for x [..., K] in fp32, bf16 or fp16; y [..., N] is in its dtype, summed in fp32.

    act_pre_scale: factors [K] of the features of x, in any float dtype, or None. Factors and products are rounded to
    x's dtype. On a GPU, kernels for few tokens multiply where they load x, without a pass of its own.

    Raises:
        ValueError: the parts do not belong together, x has another number of features, or devices differ.
        TypeError: x is of another dtype.
    """
    return torch.ops.aaac_ao.linear.default(
        x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale
    )


@torch.library.impl("aaac_ao::linear", "cpu")
def _(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale=None):
    _check_parts(x.shape[-1], qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_operands(x, qdata, scale, bias, act_pre_scale)
    if act_pre_scale is not None:
        x = x * act_pre_scale.to(x.dtype)
    parts = (qdata, scale, codebooks, per_tensor_scale)
    kernel, mode = _cpu(), _cpu_mode.get()
    if kernel.supports(scale, group_size) and x.numel() // x.shape[-1] <= kernel.most_tokens(mode):
        if x.dtype == torch.float16:
            return kernel.run_linear(x.float(), *parts, group_size, bias, mode).half()
        return kernel.run_linear(x, *parts, group_size, bias, mode)
    y = _linear_in_chunks(x.reshape(-1, x.shape[-1]), *parts, group_size, bias)
    return y.view(*x.shape[:-1], scale.shape[0])


def _linear_in_chunks(flat, qdata, scale, codebooks, per_tensor_scale, group_size, bias) -> torch.Tensor:
    """Decode and multiply: neither the inputs of a block nor its results are more than CHUNK_INPUTS."""
    in_features, out_features = flat.shape[1], scale.shape[0]
    y = flat.new_empty(len(flat), out_features)
    bias = None if bias is None else bias.float()
    block_rows = max(1, CHUNK_INPUTS // max(in_features, min(_rows_per_chunk(qdata), out_features)))
    for start, stop, w in _decoded_chunks(qdata, scale, codebooks, per_tensor_scale, group_size, in_features):
        for rows in range(0, len(flat), block_rows):
            block = slice(rows, rows + block_rows)
            part = None if bias is None else bias[start:stop]
            y[block, start:stop] = torch.nn.functional.linear(flat[block].float(), w, part)
    return y


@torch.library.impl("aaac_ao::linear", "cuda")
def _(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale=None):
    from aaac_ao.kernels import dispatch

    _check_parts(x.shape[-1], qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_operands(x, qdata, scale, bias, act_pre_scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = dispatch.linear(flat, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale)
    return y.view(*x.shape[:-1], scale.shape[0])


@torch.library.register_fake("aaac_ao::linear")
def _(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale=None):
    _check_parts(x.shape[-1], qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_operands(x, qdata, scale, bias, act_pre_scale)
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _setup_context(ctx, inputs, output):
    x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act_pre_scale = inputs
    kept_x = x if ctx.needs_input_grad[7] else None
    ctx.save_for_backward(qdata, scale, codebooks, per_tensor_scale, act_pre_scale, kept_x)
    ctx.group_size, ctx.in_features = group_size, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    qdata, scale, codebooks, per_tensor_scale, act_pre_scale, kept_x = ctx.saved_tensors
    grad_x = grad_bias = grad_act_pre_scale = None
    if ctx.needs_input_grad[0] or kept_x is not None:
        w = dequantize(qdata, scale, codebooks, per_tensor_scale, ctx.group_size, ctx.in_features, grad.dtype)
        grad_x = grad @ w
    if kept_x is not None:
        products = (grad_x * kept_x).reshape(-1, ctx.in_features)
        grad_act_pre_scale = products.sum(0, dtype=torch.float32).to(act_pre_scale.dtype)
    if grad_x is not None and act_pre_scale is not None:
        grad_x = grad_x * act_pre_scale.to(grad_x.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, grad_act_pre_scale


torch.library.register_autograd("aaac_ao::linear", _backward, setup_context=_setup_context)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, in_features] in `dtype`; computed in fp32 and rounded once.

    Raises:
        ValueError: the parts do not belong together.
        TypeError: `dtype` is not fp32, bf16 or fp16.
    """
    return torch.ops.aaac_ao.dequantize.default(
        qdata, scale, codebooks, per_tensor_scale, group_size, in_features, dtype
    )


@torch.library.impl("aaac_ao::dequantize", "cpu")
def _(qdata, scale, codebooks, per_tensor_scale, group_size, in_features, dtype):
    _check_parts(in_features, qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_dtype("dtype", dtype)
    w = torch.empty(scale.shape[0], in_features, dtype=dtype, device=qdata.device)
    for start, stop, decoded in _decoded_chunks(qdata, scale, codebooks, per_tensor_scale, group_size, in_features):
        w[start:stop] = decoded
    return w


@torch.library.impl("aaac_ao::dequantize", "cuda")
def _(qdata, scale, codebooks, per_tensor_scale, group_size, in_features, dtype):
    from aaac_ao.kernels import dispatch

    _check_parts(in_features, qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_dtype("dtype", dtype)
    return dispatch.dequantize(qdata, scale, codebooks, per_tensor_scale, group_size, in_features, dtype)


@torch.library.register_fake("aaac_ao::dequantize")
def _(qdata, scale, codebooks, per_tensor_scale, group_size, in_features, dtype):
    _check_parts(in_features, qdata, scale, codebooks, per_tensor_scale, group_size)
    _check_dtype("dtype", dtype)
    return qdata.new_empty(scale.shape[0], in_features, dtype=dtype)


def linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments of `torch.nn.functional.linear`, however they were passed, in order."""
    return input, weight, bias


def dequantize_rows(
    rows: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The rows listed in `rows` (1-D int64, 0 <= row < N) of the weight: [len(rows), in_features] in `dtype`."""
    if len(rows) == 0:
        return torch.empty(0, in_features, dtype=dtype, device=qdata.device)
    bits = scale.view(torch.uint8).view(*scale.shape, -1)[rows].flatten(1).view(scale.dtype)
    w = _decode(bytes_of_rows(qdata, rows), bits, codebooks, group_size, in_features)
    return (w if per_tensor_scale is None else w.mul_(per_tensor_scale)).to(dtype)


def _decoded_chunks(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """First row, end row and fp32 weights of one chunk of rows after the other; the next may overwrite them."""
    out_features, kernel = scale.shape[0], _cpu()
    compiled = kernel.supports(scale, group_size)
    # compiled, a weight takes 4 bytes, and products of few rows are slow
    rows = _rows_per_chunk(qdata) * (2 if compiled else 1)
    # one for all chunks: new pages for each would take as long as decoding into them
    buffer = torch.empty(min(rows, out_features), in_features) if compiled else None
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        tiles, some = qdata[start // TILE_ROWS : ceil_div(stop, TILE_ROWS)], scale[start:stop]
        if compiled:
            w = buffer[: stop - start]
            kernel.dequantize(tiles, some, codebooks, per_tensor_scale, group_size, in_features, out=w)
        else:
            w = _decode(natural_bytes(tiles)[: stop - start], some, codebooks, group_size, in_features)
            w = w if per_tensor_scale is None else w.mul_(per_tensor_scale)
        yield start, stop, w


def _decode(
    pairs: torch.Tensor, scale: torch.Tensor, codebooks: torch.Tensor, group_size: int, in_features: int
) -> torch.Tensor:
    """Rows of byte pairs [n, >= in_features / 2] to fp32 [n, in_features], without the per-tensor scale."""
    magnitude, selector = load_scale(scale)
    columns = scale.shape[1] * group_size
    pairs = torch.nn.functional.pad(pairs, (0, columns // 2 - pairs.shape[1])).to(torch.int32)
    # one lookup per byte: entry 256 * book + byte holds the two values of that byte
    byte = torch.arange(256, device=pairs.device)
    books = codebooks.float()
    table = torch.stack([books[:, byte & 15], books[:, byte >> 4]], dim=-1).view(512, 2)
    index = pairs.view(len(scale), scale.shape[1], -1).add_(selector.to(torch.int32)[..., None], alpha=256)
    w = torch.nn.functional.embedding(index, table).view(len(scale), scale.shape[1], group_size)
    return w.mul_(magnitude[..., None]).view(len(scale), columns)[:, :in_features]


def _rows_per_chunk(qdata: torch.Tensor) -> int:
    columns = qdata.shape[1] // 8
    return max(1, CHUNK_WEIGHTS // (columns * TILE_ROWS)) * TILE_ROWS


def _check_parts(
    in_features: int,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
) -> None:
    out_features = scale.shape[0]
    if tuple(qdata.shape) != packed_shape(out_features, in_features):
        raise ValueError(
            f"in_features {in_features} does not fit this weight: its qdata {list(qdata.shape)} holds "
            f"{qdata.shape[1] // 8 - TILE_COLUMNS + 1} to {qdata.shape[1] // 8} features"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    if scale.dim() != 2 or scale.shape[1] != ceil_div(in_features, group_size):
        raise ValueError(
            f"scale {list(scale.shape)} does not fit in_features {in_features} with group_size {group_size}"
        )
    if tuple(codebooks.shape) != (2, 16):
        raise ValueError(f"codebooks must have shape [2, 16], got {list(codebooks.shape)}")
    if qdata.dtype != torch.uint8 or codebooks.dtype != torch.bfloat16:
        raise ValueError(f"qdata must be uint8 and codebooks bfloat16, got {qdata.dtype} and {codebooks.dtype}")
    if per_tensor_scale is not None and (per_tensor_scale.dtype != torch.float32 or per_tensor_scale.numel() != 1):
        raise ValueError(
            f"per_tensor_scale must be one float32, got {per_tensor_scale.dtype} {list(per_tensor_scale.shape)}"
        )
    if scale.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        raise ValueError(f"scale must be bfloat16 or float8_e4m3fn, got {scale.dtype}")
    devices = [part.device for part in (qdata, scale, codebooks, per_tensor_scale) if part is not None]
    if devices.count(qdata.device) != len(devices):
        raise ValueError(f"parts on different devices: {', '.join(map(str, devices))}")


def _check_operands(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    act_pre_scale: torch.Tensor | None,
) -> None:
    _check_dtype("x", x.dtype)
    if act_pre_scale is not None:
        if tuple(act_pre_scale.shape) != (x.shape[-1],):
            raise ValueError(f"act_pre_scale must have shape [{x.shape[-1]}], got {list(act_pre_scale.shape)}")
        if not act_pre_scale.is_floating_point():
            raise TypeError(f"act_pre_scale must be of a float dtype, got {act_pre_scale.dtype}")
    if bias is not None and tuple(bias.shape) != (scale.shape[0],):
        raise ValueError(f"bias must have shape [{scale.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias), ("act_pre_scale", act_pre_scale)):
        if tensor is not None and tensor.device != qdata.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {qdata.device}; move one of them")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
