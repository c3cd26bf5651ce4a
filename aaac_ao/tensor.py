"""`AAACTensor`: a weight stored as packed 4-bit codes, signed group scales and two 16-entry codebooks."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torchao.utils import TorchAOBaseTensor

from aaac_ao import ops
from aaac_ao.config import AAACConfig
from aaac_ao.encode import Encoding, Statistics, encode
from aaac_ao.formats import FORMATS
from aaac_ao.packing import TILE_BYTES, TILE_COLUMNS, ceil_div, pack, packed_shape


class AAACTensor(TorchAOBaseTensor):
    """A quantised weight of logical shape [N, K] (out_features, in_features).

    w[n, k] = per_tensor_scale * |scale[n, g]| * codebooks[sign bit of scale[n, g]][code[n, k]], g = k // group_size.

    Stored tensors:
        qdata: uint8 [ceil(N / 16), ceil(K / 64) * 512], codes in tiles (see `packing`).
        scale: [N, ceil(K / group_size)], bfloat16 (format "int4") or float8_e4m3fn ("nvfp4").
        codebooks: bfloat16 [2, 16].
        per_tensor_scale: float32 0-D, only with float8 scales.
        act_pre_scale: [K], optional; the input is multiplied by it before the product.

    Attributes:
        group_size: weights per scale.
        k_pad: columns of filling in qdata; the shape is derived from qdata, scale and this, never stored.
        dtype: the dtype the weight is presented in, and its default dequantised dtype.
        transposed: whether this is the [K, N] view that `t()` returns.

    Codebooks and per-tensor scale are inner tensors for dispatch and compilation (a plain attribute would be a guard
    that recompiles every layer) but plain numbers for serialisation (tensors there must be laid out like the weight, or
    tensor-parallel loaders cut them): `codebook_values` and `per_tensor_scale_value` are those numbers.

    Raises:
        ValueError: the parts do not belong together.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["group_size", "k_pad", "dtype", "codebook_values", "per_tensor_scale_value"]
    optional_tensor_data_names = ["act_pre_scale"]
    optional_tensor_attribute_names = ["transposed"]

    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        group_size: int,
        k_pad: int,
        dtype: torch.dtype,
        codebook_values: torch.Tensor | list[list[float]],
        per_tensor_scale_value: torch.Tensor | float | None = None,
        act_pre_scale: torch.Tensor | None = None,
        transposed: bool = False,
    ):
        n, k = scale.shape[0], qdata.shape[1] // TILE_BYTES * TILE_COLUMNS - k_pad
        if qdata.dtype != torch.uint8 or tuple(qdata.shape) != packed_shape(n, k):
            raise ValueError(
                f"not an AAACTensor: qdata {qdata.dtype} {list(qdata.shape)} with k_pad {k_pad} does not fit "
                f"the {n} rows of scale {list(scale.shape)}"
            )
        if scale.shape[1] != ceil_div(k, group_size) or scale.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
            raise ValueError(
                f"not an AAACTensor: scale {scale.dtype} {list(scale.shape)} does not fit "
                f"{k} in_features in groups of {group_size}"
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (k, n) if transposed else (n, k),
            strides=(1, k) if transposed else (k, 1),
            device=qdata.device,
            dtype=dtype,
            requires_grad=False,
        )

    def __init__(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        group_size: int,
        k_pad: int,
        dtype: torch.dtype,
        codebook_values: torch.Tensor | list[list[float]],
        per_tensor_scale_value: torch.Tensor | float | None = None,
        act_pre_scale: torch.Tensor | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        if not isinstance(codebook_values, torch.Tensor):
            codebook_values = torch.tensor(codebook_values, dtype=torch.bfloat16, device=qdata.device)
        if per_tensor_scale_value is not None and not isinstance(per_tensor_scale_value, torch.Tensor):
            per_tensor_scale_value = torch.tensor(per_tensor_scale_value, dtype=torch.float32, device=qdata.device)
        if tuple(codebook_values.shape) != (2, 16):
            raise ValueError(f"not an AAACTensor: codebooks must be [2, 16], got {list(codebook_values.shape)}")
        if (scale.dtype == torch.float8_e4m3fn) != (per_tensor_scale_value is not None):
            raise ValueError(f"not an AAACTensor: scale {scale.dtype} with per_tensor_scale {per_tensor_scale_value}")
        if act_pre_scale is not None and tuple(act_pre_scale.shape) != (self.shape[0 if transposed else 1],):
            raise ValueError(f"not an AAACTensor: act_pre_scale {list(act_pre_scale.shape)} of {list(self.shape)}")
        self.qdata, self.scale, self.codebooks = qdata, scale, codebook_values
        self.per_tensor_scale, self.act_pre_scale = per_tensor_scale_value, act_pre_scale
        self.group_size, self.k_pad, self.transposed = group_size, k_pad, transposed
        self.partial_view = False  # a slice: its codebooks are shared with the rest of the weight it was cut from

    # construction and reading

    @classmethod
    def from_hp(cls, weight: torch.Tensor, config: AAACConfig, statistics: Statistics | None = None) -> AAACTensor:
        """Quantise a high-precision weight [N, K].

        Args:
            weight: fp32, bf16 or fp16, finite, K >= config.group_size.
            config: the settings; `step` is ignored.
            statistics: second moments of the layer's inputs; None weighs all channels alike.

        Raises:
            ValueError, TypeError: see `aaac_ao.encode.encode`.
        """
        return _from_hp(weight, config, statistics)

    @classmethod
    def from_encoding(cls, encoding: Encoding, config: AAACConfig, dtype: torch.dtype) -> AAACTensor:
        """Pack an encoding made with `config`; `dtype` is the dtype the weight presents."""
        pts, fmt = encoding.per_tensor_scale, config.scale_format
        return cls(
            pack(encoding.codes),
            fmt.store(encoding.scale, encoding.selector, pts),
            config.group_size,
            -encoding.codes.shape[1] % TILE_COLUMNS,
            dtype,
            encoding.codebooks.bfloat16(),
            pts,
        )

    @classmethod
    def empty(
        cls, shape: tuple[int, int], config: AAACConfig, dtype: torch.dtype, device: torch.device | str
    ) -> AAACTensor:
        """An uninitialised weight for a checkpoint to fill: NaN codebooks mark that nothing was loaded yet."""
        n, k = shape
        fmt = config.scale_format
        return cls(
            torch.zeros(packed_shape(n, k), dtype=torch.uint8, device=device),
            torch.zeros(n, ceil_div(k, config.group_size), device=device).to(fmt.scale_dtype),
            config.group_size,
            -k % TILE_COLUMNS,
            dtype,
            torch.full((2, 16), math.nan, dtype=torch.bfloat16, device=device),
            torch.ones((), device=device) if fmt.has_per_tensor_scale else None,
        )

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a plain tensor, in `output_dtype` (fp32, bf16 or fp16; default: `self.dtype`)."""
        dtype = self.dtype if output_dtype is None else output_dtype
        w = ops.dequantize(*self._parts(), self.group_size, self.in_features, dtype)
        return w.t() if self.transposed else w

    @property
    def in_features(self) -> int:
        """K, whether transposed or not."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def out_features(self) -> int:
        """N, whether transposed or not."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def format(self) -> str:
        """Name of the scale format."""
        return next(name for name, fmt in FORMATS.items() if fmt.scale_dtype == self.scale.dtype)

    @property
    def stored_bytes(self) -> int:
        """True number of bytes of the stored tensors (`nbytes` reports those of the dense weight)."""
        return sum(part.numel() * part.element_size() for part in self._inner().values())

    @property
    def codebook_values(self) -> list[list[float]]:
        """The codebooks as numbers, exact."""
        return self.codebooks.float().tolist()

    @property
    def per_tensor_scale_value(self) -> float | None:
        """The per-tensor scale as a number, exact."""
        return None if self.per_tensor_scale is None else self.per_tensor_scale.item()

    def __repr__(self) -> str:
        return (
            f"AAACTensor(shape={list(self.shape)}, format={self.format!r}, group_size={self.group_size}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    # plumbing

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.qdata, self.scale, self.codebooks, self.per_tensor_scale

    def _inner(self) -> dict[str, torch.Tensor]:
        names = ("qdata", "scale", "codebooks", "per_tensor_scale", "act_pre_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _replace(self, **changes: Any) -> AAACTensor:
        """A new tensor with some of the parts or attributes changed."""
        now = dict(self._inner(), group_size=self.group_size, k_pad=self.k_pad, dtype=self.dtype)
        return _build({**now, "transposed": self.transposed, **changes})

    def _apply_fn_to_data(self, fn) -> AAACTensor:
        out = self._replace(**{name: fn(part) for name, part in self._inner().items()})
        out.partial_view = self.partial_view
        return out

    def __tensor_flatten__(self):
        attributes = ("group_size", "k_pad", "dtype", "transposed")
        return list(self._inner()), {name: getattr(self, name) for name in attributes}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """The operators of `tensor_ops`; any other is tried in parts, which inference mode leaves whole."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, outer_size, outer_stride):
        return _build({**attributes, **tensors})

    def _stable_hash_for_caching(self) -> str:
        """Key of torch.compile's caches: everything but the values."""
        parts = [(n, tuple(p.shape), p.stride(), str(p.dtype), str(p.device)) for n, p in self._inner().items()]
        key = repr((parts, self.group_size, self.k_pad, str(self.dtype), self.transposed, self.requires_grad))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def share_memory_(self) -> AAACTensor:
        """Move every stored tensor to shared memory."""
        for part in self._inner().values():
            part.share_memory_()
        return self


def _build(fields: dict[str, Any]) -> AAACTensor:
    return AAACTensor(
        fields["qdata"],
        fields["scale"],
        fields["group_size"],
        fields["k_pad"],
        fields["dtype"],
        fields["codebooks"],
        fields.get("per_tensor_scale"),
        fields.get("act_pre_scale"),
        fields["transposed"],
    )


# the encoder runs once per weight and decides by its data: nothing in it to compile
@torch.compiler.disable
def _from_hp(weight: torch.Tensor, config: AAACConfig, statistics: Statistics | None) -> AAACTensor:
    return AAACTensor.from_encoding(encode(weight, config, statistics), config, weight.dtype)


AAACTensor.__module__ = "aaac_ao"
torch.serialization.add_safe_globals([AAACTensor])
