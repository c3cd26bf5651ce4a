"""The aten operators of `AAACTensor`: products, views, concatenation, copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from aaac_ao import ops
from aaac_ao.ops import linear_arguments
from aaac_ao.packing import TILE_BYTES, TILE_COLUMNS, TILE_ROWS, ceil_div
from aaac_ao.tensor import AAACTensor

aten = torch.ops.aten
implements = AAACTensor.implements
implements_torch_function = AAACTensor.implements_torch_function


# products


def _linear(x: torch.Tensor, weight: AAACTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute x W^T + bias, where W is the [N, K] weight whatever view of it is at hand."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return ops.linear(x, *weight._parts(), weight.group_size, bias, weight.act_pre_scale)


def _matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A 2-D product in which one side is a quantised weight."""
    if isinstance(b, AAACTensor) and not isinstance(a, AAACTensor):
        if b.transposed and a.shape[1] == b.in_features:
            return _linear(a, b, bias)
        b = _scaled_dequantize(b, a.dtype)
    elif isinstance(a, AAACTensor):
        b = _scaled_dequantize(b, b.dtype) if isinstance(b, AAACTensor) else b
        a = _scaled_dequantize(a, b.dtype)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _scaled_dequantize(weight: AAACTensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight with act_pre_scale multiplied in, for products that do not go through the input."""
    w = weight.dequantize(dtype)
    if weight.act_pre_scale is not None:
        w = w * (weight.act_pre_scale[:, None] if weight.transposed else weight.act_pre_scale).to(dtype)
    return w


@implements(aten.linear.default)
@implements_torch_function(torch.nn.functional.linear)
def _(func, types, args, kwargs):
    x, weight, bias = linear_arguments(*args, **kwargs)
    if isinstance(x, AAACTensor) or not isinstance(weight, AAACTensor):
        raise TypeError(f"linear takes a plain input and an AAACTensor weight, got {type(x)} and {type(weight)}")
    if weight.transposed:
        return torch.nn.functional.linear(x, _scaled_dequantize(weight, x.dtype), bias)
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"input has {x.shape[-1]} features, the weight {weight.in_features}")
    return _linear(x, weight, bias)


@implements(aten.mm.default)
def _(func, types, args, kwargs):
    return _matmul(args[0], args[1])


@implements(aten.addmm.default)
def _(func, types, args, kwargs):
    bias, a, b = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if alpha == 1 and beta == 1 and bias.shape == b.shape[1:]:
        return _matmul(a, b, bias)
    product = alpha * _matmul(a, b)
    return product + beta * bias if beta != 0 else product  # beta 0 ignores the bias, NaN or not


# views


@implements(aten.t.default)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, _transpose(args[0], True))


@implements(aten.transpose.int)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, _transpose(args[0], _dim(args[1]) != _dim(args[2])))


@implements(aten.permute.default)
def _(func, types, args, kwargs):
    dims = [_dim(dim) for dim in args[1]]
    if sorted(dims) != [0, 1]:
        raise ValueError(f"an AAACTensor has two dimensions, it cannot be permuted to {list(args[1])}")
    return return_and_correct_aliasing(func, args, kwargs, _transpose(args[0], dims == [1, 0]))


def _transpose(weight: AAACTensor, flip: bool) -> AAACTensor:
    out = weight._replace(transposed=weight.transposed != flip)
    out.partial_view = weight.partial_view
    return out


def _dim(dim: int) -> int:
    if not -2 <= dim < 2:
        raise IndexError(f"an AAACTensor has two dimensions, got dimension {dim}")
    return dim % 2


@implements(aten.view.default)
def _(func, types, args, kwargs):
    weight, shape = args[0], list(args[1])
    if len(shape) != 2 or any(size not in (-1, own) for size, own in zip(shape, weight.shape, strict=True)):
        raise ValueError(
            f"an AAACTensor of shape {list(weight.shape)} cannot be viewed as {shape}; dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, weight._apply_fn_to_data(lambda part: part.detach()))


def _column_unit(weight: AAACTensor) -> int:
    """Smallest number of input columns that cuts neither a tile nor a group."""
    return math.lcm(TILE_COLUMNS, weight.group_size)


def _slice(weight: AAACTensor, dim: int, start: int, stop: int) -> AAACTensor:
    """Rows or columns [start, stop) as a view; they must not cut a tile or a group."""
    rows = (_dim(dim) == 0) != weight.transposed
    size, unit = (weight.out_features, TILE_ROWS) if rows else (weight.in_features, _column_unit(weight))
    start, stop = (min(max(edge + size if edge < 0 else edge, 0), size) for edge in (start, stop))
    if stop <= start:
        raise ValueError(f"empty slice [{start}:{stop}] of an AAACTensor dimension of size {size}")
    if start % unit or (stop % unit and stop != size):
        raise ValueError(
            f"slice [{start}:{stop}] of {'out' if rows else 'in'}_features {size} cuts a "
            f"{'tile' if rows else 'tile or a group'}: use multiples of {unit}, or dequantize() first"
        )
    if rows:
        tiles = slice(start // TILE_ROWS, ceil_div(stop, TILE_ROWS))
        changes: dict[str, Any] = {"qdata": weight.qdata[tiles], "scale": weight.scale[start:stop]}
    else:
        first, last = start // TILE_COLUMNS * TILE_BYTES, ceil_div(stop, TILE_COLUMNS) * TILE_BYTES
        groups = slice(start // weight.group_size, ceil_div(stop, weight.group_size))
        changes = {
            "qdata": weight.qdata[:, first:last],
            "scale": weight.scale[:, groups],
            "k_pad": -stop % TILE_COLUMNS,
        }
        if weight.act_pre_scale is not None:
            changes["act_pre_scale"] = weight.act_pre_scale[start:stop]
    out = weight._replace(**changes)
    out.partial_view = weight.partial_view or stop - start < size
    return out


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, stop, step = fill_defaults(args, 5, [0, None, None, 1])
    if step != 1:
        raise ValueError(f"an AAACTensor can only be sliced with step 1, got {step}")
    stop = weight.shape[dim] if stop is None else stop
    return return_and_correct_aliasing(func, args, kwargs, _slice(weight, dim, start or 0, stop))


def _split(weight: AAACTensor, sizes: list[int], dim: int) -> list[AAACTensor]:
    if sum(sizes) != weight.shape[dim]:
        raise ValueError(f"split sizes {sizes} do not add up to {weight.shape[dim]}")
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [_slice(weight, dim, start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, sizes, dim = fill_defaults(args, 3, [0])
    dim = kwargs.get("dim", dim)
    if isinstance(sizes, int):
        sizes = [min(sizes, weight.shape[dim] - start) for start in range(0, weight.shape[dim], sizes)]
    return _split(weight, list(sizes), dim)


# rows


def _rows(weight: AAACTensor, index: torch.Tensor, negative: bool = True) -> torch.Tensor:
    """Dense rows of the [N, K] weight for an index tensor of any shape: [*index.shape, K]."""
    if index.dtype not in (torch.int32, torch.int64):
        raise IndexError(f"rows of an AAACTensor are indexed with int32 or int64, got {index.dtype}")
    flat, n = index.reshape(-1).to(weight.device, torch.int64), weight.out_features
    if flat.numel() and (int(flat.min()) < (-n if negative else 0) or int(flat.max()) >= n):
        raise IndexError(f"row index out of range for {n} rows: {int(flat.min())} to {int(flat.max())}")
    dense = ops.dequantize_rows(flat % n, *weight._parts(), weight.group_size, weight.in_features, weight.dtype)
    return dense.view(*index.shape, weight.in_features)


def _needs_rows(weight: AAACTensor, what: str) -> None:
    if weight.transposed:
        raise ValueError(f"{what} of a transposed AAACTensor is not supported; dequantize() it first")


@implements(aten.select.int)
def _(func, types, args, kwargs):
    weight, dim, index = args
    if (_dim(dim) == 0) == weight.transposed:
        return weight.dequantize().select(dim, index)
    return _rows(weight, torch.tensor(index, device=weight.device))


@implements(aten.index.Tensor)
def _(func, types, args, kwargs):
    weight, indices = args
    _needs_rows(weight, "indexing")
    index = indices[0]
    if index is not None and index.dtype == torch.bool and tuple(index.shape) == (weight.out_features,):
        index = index.nonzero().squeeze(1)
    if len(indices) != 1 or index is None or index.dtype in (torch.bool, torch.uint8):
        return weight.dequantize()[tuple(slice(None) if index is None else index for index in indices)]
    return _rows(weight, index)


@implements(aten.index_select.default)
def _(func, types, args, kwargs):
    weight, dim, index = args
    _needs_rows(weight, "index_select")
    if _dim(dim) == 1 or index.dim() > 1:
        return weight.dequantize().index_select(dim, index)
    return _rows(weight, index.reshape(-1), negative=False)


@implements(aten.embedding.default)
@implements_torch_function(torch.nn.functional.embedding)
def _(func, types, args, kwargs):
    # the aten op takes (weight, indices), the function (indices, weight)
    weight, index = (args[0], args[1]) if isinstance(args[0], AAACTensor) else (args[1], args[0])
    _needs_rows(weight, "an embedding")
    return _rows(weight, index, negative=False)


# joining and copying


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    weights, dim = fill_defaults(args, 2, [0])
    dim = kwargs.get("dim", dim) % 2
    first = weights[0]
    if not all(isinstance(w, AAACTensor) for w in weights):
        raise TypeError("cat of an AAACTensor and a plain tensor; dequantize() the former first")
    rows = (dim == 0) != first.transposed
    for other in weights[1:]:
        _check_joinable(first, other, rows)
    unit = TILE_ROWS if rows else _column_unit(first)
    sizes = [w.out_features if rows else w.in_features for w in weights]
    if any(size % unit for size in sizes[:-1]):
        raise ValueError(f"cat of AAACTensors of sizes {sizes}: all but the last must be multiples of {unit}")
    axis = 0 if rows else 1
    changes: dict[str, Any] = {
        "qdata": torch.cat([w.qdata for w in weights], axis),
        "scale": torch.cat([w.scale for w in weights], axis),
        "k_pad": weights[-1].k_pad,
    }
    if not rows and first.act_pre_scale is not None:
        changes["act_pre_scale"] = torch.cat([w.act_pre_scale for w in weights])
    return first._replace(**changes)


def _check_joinable(a: AAACTensor, b: AAACTensor, rows: bool) -> None:
    """Tensors that become one must share everything that is stored once per tensor."""
    same_kind = (a.format, a.group_size, a.dtype, a.transposed) == (b.format, b.group_size, b.dtype, b.transposed)
    same_side = a.in_features == b.in_features if rows else a.out_features == b.out_features
    if not same_kind or not same_side:
        raise ValueError(f"cannot cat {a} and {b}")
    pairs = [(a.codebooks, b.codebooks), (a.per_tensor_scale, b.per_tensor_scale)]
    if rows or (a.act_pre_scale is None) != (b.act_pre_scale is None):
        pairs.append((a.act_pre_scale, b.act_pre_scale))
    if not all(_same(left, right) for left, right in pairs):
        raise ValueError("cannot cat AAACTensors with different codebooks or scales; dequantize() them first")


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    weight, source = args[0], args[1]
    if not isinstance(weight, AAACTensor) or not isinstance(source, AAACTensor):
        raise TypeError(
            f"copy_ between {type(weight).__name__} and {type(source).__name__}; quantise or dequantize() first"
        )
    kinds = [(w.format, w.group_size, w.transposed, list(w._inner())) for w in (weight, source)]
    if weight.shape != source.shape or kinds[0] != kinds[1]:
        raise ValueError(f"cannot copy {source} into {weight}")
    if weight.partial_view and not bool(weight.codebooks.isnan().any()):
        shared = [(weight.codebooks, source.codebooks), (weight.per_tensor_scale, source.per_tensor_scale)]
        if not all(_same(left, right.to(weight.device) if right is not None else None) for left, right in shared):
            raise ValueError(
                "cannot copy into a slice of an AAACTensor whose other parts use different codebooks: "
                "layers that are fused when loading must be quantised with shared codebooks"
            )
    for name, part in weight._inner().items():
        part.copy_(getattr(source, name))
    return weight


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    """Devices move, dtypes only change what the weight presents: codes and scales have dtypes of their own."""
    weight = args[0]
    target = weight._get_to_kwargs(*args[1:], **kwargs)
    if not target["dtype"].is_floating_point or target["dtype"] not in ops.FLOAT_DTYPES:
        raise TypeError(f"an AAACTensor presents float32, bfloat16 or float16, not {target['dtype']}")
    device, non_blocking = target["device"], kwargs.get("non_blocking", False)
    # copy: on the same device `to` would return the very parts, and writing to the result would change the source
    moved = {name: part.to(device, non_blocking=non_blocking, copy=True) for name, part in weight._inner().items()}
    return return_and_correct_aliasing(func, args, kwargs, weight._replace(**moved, dtype=target["dtype"]))


@implements(aten.clone.default)
def _(func, types, args, kwargs):
    out = args[0]._apply_fn_to_data(lambda part: func(part, *args[1:], **kwargs))
    out.partial_view = False  # it owns its codebooks
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    weight = args[0]
    device = kwargs.get("device") or weight.device
    inner = {name: torch.empty_like(part, device=device) for name, part in weight._inner().items()}
    inner["codebooks"].fill_(float("nan"))  # marks that nothing was copied in yet
    return weight._replace(**inner, dtype=kwargs.get("dtype") or weight.dtype)


@implements(aten.equal.default)
def _(func, types, args, kwargs):
    a, b = args
    if not isinstance(a, AAACTensor) or not isinstance(b, AAACTensor):
        return False
    if a.shape != b.shape or (a.group_size, a.transposed) != (b.group_size, b.transposed):
        return False
    left, right = a._inner(), b._inner()
    return left.keys() == right.keys() and all(_same_bits(left[name], right[name]) for name in left)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.dim()
        else torch.equal(a, b)
    )


@implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return all(part.is_pinned() for part in args[0]._inner().values())


@implements(aten._pin_memory.default)
def _(func, types, args, kwargs):
    return args[0]._apply_fn_to_data(lambda part: part.pin_memory())
