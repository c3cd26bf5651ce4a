"""Host side: checks, which kernel (see `table`), and its launch. The hot path reads no tensor's values."""

from __future__ import annotations

import contextlib

import torch

from . import blocks, launch, table

#: x dtypes of `linear` and result dtypes of `dequantize`.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Group sizes by scale dtype.
GROUP_SIZES = {torch.bfloat16: (32, 64, 128), torch.float8_e4m3fn: (16,)}
#: Offsets inside a block of x, and rows of codes and scales, are int32.
MAX_OFFSET = 2**31 - 1


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None = None,
    act_pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x @ w.T + bias for a stored weight w [N, K], summed in fp32.

    With fp32 x, and with few tokens and large groups, w is not rounded; see `rounds_weights` for where it is rounded
    once to x's dtype: the result is then that of dequantising to this dtype and multiplying. Everything behind the sum
    is fp32 up to the cast to x's dtype, but for many tokens: there it is what `torch.addmm` does. Extra memory is
    bounded: at most 16 fp32 copies of y for up to 64 tokens, or one slab of dequantised rows
    (`table.Limits.slab_bytes`).

    Args:
        x: [M, K], bf16, fp16 or fp32; M may be 0.
        qdata: packed codes, uint8 [ceil(N / 16), ceil(K / 64) * 512]; rows may be strided.
        scale: signed scales [N, ceil(K / group_size)], bf16 or float8_e4m3fn; rows may be strided.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32 0-D factor of the whole weight, or None.
        group_size: weights per scale along K; 32, 64 or 128 with bf16 scales, 16 with float8_e4m3fn.
        bias: [N], any float dtype, or None.
        act_pre_scale: factors [K] of the features of x, any float dtype, or None; factors and products are rounded to
            x's dtype.

    Returns:
        y [M, N] in x's dtype, contiguous.

    Raises:
        ValueError: a dtype, shape, stride, alignment or device the kernels do not take, or too many blocks for a grid.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be 2-D bf16, fp16 or fp32, got {x.dim()}-D {x.dtype}")
    tokens, in_features = x.shape
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features)
    out_features = scale.shape[0]
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")
    if act_pre_scale is not None and tuple(act_pre_scale.shape) != (in_features,):
        raise ValueError(f"act_pre_scale must have shape [{in_features}], got {list(act_pre_scale.shape)}")
    for name, tensor in (("x", x), ("bias", bias), ("act_pre_scale", act_pre_scale)):
        if tensor is not None and tensor.device != qdata.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {qdata.device}; move one of them")
    if x.dtype == torch.float32:
        block_m, block_n = next(row[1:3] for row in launch.EXACT if tokens <= row[0])
        launch.grid(launch.ceil_div(tokens, block_m) * launch.ceil_div(out_features, block_n), [tokens, out_features])
    weight = (qdata, scale, codebooks.contiguous(), per_tensor_scale, group_size)
    limits, _ = table.of_device(x.device)
    if tokens == 0 or out_features == 0:
        return x.new_empty(tokens, out_features)
    bias, act = _contiguous(bias), _contiguous(act_pre_scale)
    with _on(x):
        if x.dtype == torch.float32:
            return launch.exact(x if x.stride(1) == 1 else x.contiguous(), *weight, bias, act)
        if tokens > limits.fused_tokens or tokens * in_features > MAX_OFFSET:
            return launch.dense(x, *weight, bias, act, limits.slab_bytes)
        x = x if x.stride(1) == 1 and x.stride(0) * tokens < MAX_OFFSET else x.contiguous()
        layer = (x, *weight, bias, act)
        return launch.launch_pairs(*layer) if launch.fits_pairs(*layer, limits.pair_weights) else launch.fused(*layer)


def rounds_weights(dtype: torch.dtype, tokens: int, group_size: int, device: torch.device) -> bool:
    """Whether `linear` rounds weights to x's dtype for this many tokens: by half a unit in their last place."""
    if dtype == torch.float32 or tokens == 0:
        return False
    if tokens > table.of_device(device)[0].fused_tokens:
        return True
    return blocks.scales_weights(blocks.block_for(tokens), group_size)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The stored weight as a plain tensor.

    Args:
        qdata: packed codes, uint8 [ceil(N / 16), ceil(K / 64) * 512]; rows may be strided.
        scale: signed scales [N, ceil(K / group_size)], bf16 or float8_e4m3fn; rows may be strided.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32 0-D factor of the whole weight, or None.
        group_size: weights per scale along K; 32, 64 or 128 with bf16 scales, 16 with float8_e4m3fn.
        in_features: K.
        dtype: bf16, fp16 or fp32.

    Returns:
        w [N, K] in `dtype`, contiguous.

    Raises:
        ValueError: a dtype, shape, stride, alignment or device the kernel does not take, or too many blocks for a grid.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bf16, fp16 or fp32, got {dtype}")
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features)
    w = scale.new_empty(scale.shape[0], in_features, dtype=dtype)
    if w.numel():
        with _on(w):
            launch.dequantize_into(w, qdata, scale, codebooks.contiguous(), per_tensor_scale, group_size)
    return w


def _check_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
) -> None:
    """Reject whatever would make a kernel read outside the tensors or misread their bits."""
    if scale.dtype not in GROUP_SIZES or group_size not in GROUP_SIZES[scale.dtype]:
        known = {str(dtype): sizes for dtype, sizes in GROUP_SIZES.items()}
        raise ValueError(f"no kernel for {scale.dtype} scales with group_size {group_size}; known: {known}")
    rows, row_bytes = launch.ceil_div(scale.shape[0], 16), launch.ceil_div(in_features, 64) * 512
    if qdata.dtype != torch.uint8 or tuple(qdata.shape) != (rows, row_bytes):
        raise ValueError(f"qdata must be uint8 [{rows}, {row_bytes}], got {qdata.dtype} {list(qdata.shape)}")
    if row_bytes > MAX_OFFSET:
        raise ValueError(f"in_features {in_features} is too large: a row of tiles must have less than 2^31 bytes")
    if scale.dim() != 2 or scale.shape[1] != launch.ceil_div(in_features, group_size):
        raise ValueError(f"scale must be [N, {launch.ceil_div(in_features, group_size)}], got {list(scale.shape)}")
    if codebooks.dtype != torch.bfloat16 or tuple(codebooks.shape) != (2, 16):
        raise ValueError(f"codebooks must be bf16 [2, 16], got {codebooks.dtype} {list(codebooks.shape)}")
    for name, tensor in (("qdata", qdata), ("scale", scale)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have stride 1 along K, got strides {tensor.stride()}")
    if qdata.storage_offset() % 16 or (qdata.shape[0] > 1 and qdata.stride(0) % 16):
        raise ValueError(f"rows of qdata must start at multiples of 16 bytes, got offset {qdata.storage_offset()} "
                         f"and strides {qdata.stride()}")  # fmt: skip
    if per_tensor_scale is not None and (per_tensor_scale.dtype != torch.float32 or per_tensor_scale.numel() != 1):
        raise ValueError(
            f"per_tensor_scale must be one fp32 number, got {per_tensor_scale.dtype} {list(per_tensor_scale.shape)}"
        )
    for part in (scale, codebooks, per_tensor_scale):
        if part is not None and part.device != qdata.device:
            raise ValueError(f"parts of the weight on {part.device} and {qdata.device}; move them to one device")


def _contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one: Triton launches there, not where the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
