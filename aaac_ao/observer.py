"""`ObserverTensor`: a weight that measures the inputs of its layer while the model runs as before.

A weight subclass instead of a module swap: it works wherever the layer is called, also where a caller quantises a bare
`nn.Linear` and drops what is returned.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torchao.utils import TorchAOBaseTensor

from aaac_ao.moments import InputSums
from aaac_ao.ops import linear_arguments

aten = torch.ops.aten


class ObserverTensor(TorchAOBaseTensor):
    """A high-precision weight [N, K] that accumulates the second moments of the inputs of its layer.

    Products with an input are observed (`F.linear`, and `x @ weight.T`); everything else sees the plain weight.

    Stored tensors:
        hp_data: the weight itself, or its transpose.
        squares: fp32 [K], the sum of x_j^2 over all input vectors; sums of several runs add up.
        tokens: int64 0-D, the number of input vectors.
        hessian: fp32 [K, K], the sum of x x^T, optional.

    Nothing is read back from the device while observing, and nothing but these sums is kept.

    Attributes:
        transposed: whether this is the [K, N] view that `t()` returns.
    """

    tensor_data_names = ["hp_data", "squares", "tokens"]
    tensor_attribute_names = ["transposed"]
    optional_tensor_data_names = ["hessian"]

    def __new__(cls, hp_data, squares, tokens, transposed=False, hessian=None):
        return torch.Tensor._make_wrapper_subclass(
            cls, hp_data.shape, strides=hp_data.stride(), device=hp_data.device, dtype=hp_data.dtype
        )

    def __init__(self, hp_data, squares, tokens, transposed=False, hessian=None):
        super().__init__()
        self.hp_data, self.squares, self.tokens, self.hessian = hp_data, squares, tokens, hessian
        self.transposed = transposed

    @classmethod
    def from_hp(cls, weight: torch.Tensor, full: bool = False) -> ObserverTensor:
        """Start observing the inputs of a weight [N, K].

        Args:
            weight: the weight; it is kept, not copied.
            full: also accumulate the full matrix of second moments (K^2 fp32 numbers).
        """
        sums = InputSums.zeros(weight.shape[-1], weight.device, full)
        return cls(weight.detach(), sums.squares, sums.tokens, False, sums.hessian)

    @property
    def sums(self) -> InputSums:
        """What was observed so far."""
        return InputSums(self.squares, self.tokens, self.hessian)

    def __repr__(self) -> str:
        return f"ObserverTensor(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def _with_data(self, hp_data: torch.Tensor, transposed: bool) -> ObserverTensor:
        """Another view or dtype of the weight that adds to the same sums."""
        return ObserverTensor(hp_data, self.squares, self.tokens, transposed, self.hessian)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """The operators below; any other runs on the plain weight."""
        if func in cls._ATEN_OP_TABLE[cls]:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        plain = lambda value: value.hp_data if isinstance(value, cls) else value  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


implements = ObserverTensor.implements


@implements(aten.linear.default)
@ObserverTensor.implements_torch_function(linear)
def _(func, types, args, kwargs):
    x, weight, bias = linear_arguments(*args, **kwargs)
    if not weight.transposed:
        weight.sums.add(x)
    return linear(x, weight.hp_data, bias)


@implements([aten.mm.default, aten.addmm.default])
def _(func, types, args, kwargs):
    *before, x, weight = args
    if isinstance(weight, ObserverTensor) and weight.transposed and not isinstance(x, ObserverTensor):
        weight.sums.add(x)
    plain = [operand.hp_data if isinstance(operand, ObserverTensor) else operand for operand in (x, weight)]
    return func(*before, *plain, **kwargs)


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    weight, flipped = args[0], func(args[0].hp_data, *args[1:])
    is_flip = flipped.stride() != weight.hp_data.stride() or flipped.shape != weight.hp_data.shape
    out = weight._with_data(flipped, weight.transposed != is_flip)
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    """Devices move everything; dtypes are those of the weight, the sums stay fp32."""
    weight = args[0]
    target = weight._get_to_kwargs(*args[1:], **kwargs)
    sums = [part.to(target["device"]) for part in (weight.squares, weight.tokens)]
    hessian = weight.hessian if weight.hessian is None else weight.hessian.to(target["device"])
    moved = weight.hp_data.to(device=target["device"], dtype=target["dtype"])
    out = ObserverTensor(moved, *sums, weight.transposed, hessian)
    return return_and_correct_aliasing(func, args, kwargs, out)


ObserverTensor.__module__ = "aaac_ao"
torch.serialization.add_safe_globals([ObserverTensor])
