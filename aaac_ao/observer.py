"""`ObserverTensor`: a weight that measures the inputs of its layer while the model runs as before.

A weight subclass instead of a module swap: it works wherever the layer is called, also where a caller quantises a bare
`nn.Linear` and drops what is returned.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torchao.utils import TorchAOBaseTensor, fill_defaults

from aaac_ao.encode import Statistics

aten = torch.ops.aten


class ObserverTensor(TorchAOBaseTensor):
    """A high-precision weight [N, K] that accumulates the second moments of the inputs of its layer.

    Stored tensors:
        hp_data: the weight itself.
        squares: fp32 [K], the sum of x_j^2 over all input vectors; sums of several runs add up.
        tokens: int64 0-D, the number of input vectors.
        hessian: fp32 [K, K], the sum of x x^T, optional.

    Nothing is read back from the device while observing, and nothing but these sums is kept.
    """

    tensor_data_names = ["hp_data", "squares", "tokens"]
    tensor_attribute_names = []
    optional_tensor_data_names = ["hessian"]

    def __new__(cls, hp_data, squares, tokens, hessian=None):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            hp_data.shape,
            strides=hp_data.stride(),
            device=hp_data.device,
            dtype=hp_data.dtype,
            requires_grad=False,
        )

    def __init__(self, hp_data, squares, tokens, hessian=None):
        super().__init__()
        self.hp_data, self.squares, self.tokens, self.hessian = hp_data, squares, tokens, hessian

    @classmethod
    def from_hp(cls, weight: torch.Tensor, full: bool = False) -> ObserverTensor:
        """Start observing the inputs of a weight [N, K].

        Args:
            weight: the weight; it is kept, not copied.
            full: also accumulate the full matrix of second moments (K^2 fp32 numbers).
        """
        k, device = weight.shape[-1], weight.device
        hessian = torch.zeros(k, k, device=device) if full else None
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        return cls(weight.detach(), torch.zeros(k, device=device), tokens, hessian)

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Add the input vectors x [..., K] to the sums."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.squares += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        self.tokens += len(x)
        if self.hessian is not None:
            x = x.float()
            self.hessian.addmm_(x.t(), x)

    def statistics(self) -> Statistics:
        """What was observed, as means.

        Raises:
            ValueError: no input was seen.
        """
        tokens = int(self.tokens)
        if tokens == 0:
            raise ValueError(
                "0 batches seen: run calibration batches through the model between 'prepare' and 'convert'"
            )
        return Statistics(self.squares / tokens, tokens)

    def __repr__(self) -> str:
        return f"ObserverTensor(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


@ObserverTensor.implements(aten.linear.default)
@ObserverTensor.implements_torch_function(linear)
def _(func, types, args, kwargs):
    x, weight, bias = fill_defaults(args, 3, [None])
    weight.observe(x)
    return linear(x, weight.hp_data, kwargs.get("bias", bias))


ObserverTensor.__module__ = "aaac_ao"
torch.serialization.add_safe_globals([ObserverTensor])
