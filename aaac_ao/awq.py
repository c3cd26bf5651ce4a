"""AWQ (arXiv 2306.00978): per-channel scales that make important input channels larger before they are rounded.

The inputs of a group of linear layers are divided by a scale and their weight columns multiplied by it. The division
is folded into what computes the inputs, a norm or a linear layer, so the model stays the same function at no cost. The
scale is searched with the error of this package's encoder instead of round-to-nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from aaac_ao.config import AAACConfig
from aaac_ao.encode import Statistics, check_weight, encode
from aaac_ao.packing import ceil_div

#: Exponents of the channels' magnitudes that are tried besides 0, which is no scale.
RATIOS = tuple(step / 20 for step in range(1, 20))
#: The search looks at evenly spaced rows of each weight, about this many weights of them.
SAMPLE_WEIGHTS = 1 << 17
#: A magnitude to the power of a ratio is at least this, relative to the mean channel.
_SMALLEST = 1e-4

# The names of decoder blocks in transformers; what has others is left alone.

_SEQUENTIAL = ("input_layernorm", "post_attention_layernorm")
#: All norms of a block, sorted -> the one that attention reads, and the one that the MLP reads.
_NORMS = {
    _SEQUENTIAL: _SEQUENTIAL,
    ("attention_layernorm", "feedforward_layernorm"): ("attention_layernorm", "feedforward_layernorm"),
    # attention and MLP side by side
    ("input_layernorm",): ("input_layernorm", "input_layernorm"),
    # norms before and after both: Gemma 2 and 3, GLM-4
    (*_SEQUENTIAL, "post_feedforward_layernorm", "pre_feedforward_layernorm"): (
        "input_layernorm",
        "pre_feedforward_layernorm",
    ),
    (*_SEQUENTIAL, "post_mlp_layernorm", "post_self_attn_layernorm"): _SEQUENTIAL,
}
_ATTENTION_INPUTS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",))
_MLP_INPUTS = (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",), ("fc1",), ("c_fc",), ("dense_h_to_4h",))
_OUTPUTS = ("o_proj", "dense", "down_proj", "fc2", "c_proj", "dense_4h_to_h")
#: Parts that read neither the input of an attention or MLP nor what its output layer reads.
_OTHERS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "rotary_emb", "act_fn", "activation_fn", "act")
#: Attributes of blocks that add the output of a norm to the residual stream, so that it has another reader.
_NORM_IN_RESIDUAL = ("attn_alpha_factor", "linear_attn_alpha_factor", "apply_residual_connection_post_layernorm")


@dataclass(frozen=True, eq=False)
class ScalePair:
    """Linear layers and what computes their inputs, into which the inverse of their scale can be folded.

    Attributes:
        previous: a norm with a weight [in_features], and possibly a bias, or an nn.Linear.
        layers: all that read the output of `previous`, in the order of definition.
        rows: the rows of a linear `previous` that compute the inputs; None for a norm.
        one_plus: whether a norm multiplies by 1 + its weight, as Gemma's do.
    """

    previous: nn.Module
    layers: tuple[nn.Linear, ...]
    rows: slice | None = None
    one_plus: bool = False

    @property
    def in_features(self) -> int:
        """Number of input channels of the layers: the length of a scale."""
        return self.layers[0].in_features


# which layers share a scale


def find_pairs(block: nn.Module) -> list[ScalePair]:
    """The layers of a decoder block that can be scaled, by the names and shapes of its parts.

    norm -> query, key, value; value -> output (not where heads share values, as in the reference code of the paper);
    norm -> gate, up; up -> down if the MLP is gated, because down then reads act(gate) * up. What is not recognised,
    mixtures of experts for example, or quantised already is not in a pair.

    Args:
        block: a decoder block of a transformers model, or one of the same structure.

    Returns:
        Pairs in the order in which the block computes them; no layer is in two of them as a reader.
    """
    children = dict(block.named_children())
    attention = _part(children.get("self_attn", children.get("attention")), _ATTENTION_INPUTS)
    mlp = _part(children.get("mlp"), _MLP_INPUTS)
    before_attention, before_mlp = _norms_of(block)
    if before_attention is before_mlp:
        norm_pairs = [_norm_pair(before_attention, attention, mlp), None]
    else:
        norm_pairs = [_norm_pair(before_attention, attention), _norm_pair(before_mlp, mlp)]
    pairs = [norm_pairs[0], _value_pair(attention), norm_pairs[1], _gated_pair(mlp)]
    return [pair for pair in pairs if pair is not None and _is_sound(pair)]


@dataclass(frozen=True)
class _Part:
    """An attention or an MLP whose parts are all known: the layers that read its input, and the last one."""

    module: nn.Module
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear


def _part(module: nn.Module | None, inputs: tuple[tuple[str, ...], ...]) -> _Part | None:
    if module is None or module._parameters:
        return None
    layers = _children(module, _OTHERS)
    outputs = [name for name in layers if name in _OUTPUTS]
    first = tuple(name for name in layers if name not in _OUTPUTS)
    if len(outputs) != 1 or set(first) not in [set(names) for names in inputs]:
        return None
    if any(type(layer) is not nn.Linear for layer in layers.values()):  # a subclass may compute something else
        return None
    return _Part(module, tuple(layers[name] for name in first), layers[outputs[0]])


def _children(module: nn.Module, ignored: tuple[str, ...]) -> dict[str, nn.Module]:
    """The submodules, but for those of these names and those that change nothing."""
    passive = (nn.Dropout, nn.Identity)
    return {n: m for n, m in module.named_children() if n not in ignored and not isinstance(m, passive)}


def _norms_of(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms that attention and MLP read; None where that is not certain."""
    others = _children(block, ("self_attn", "attention", "mlp"))
    names = _NORMS.get(tuple(sorted(others)))
    if names is None or block._parameters or any(hasattr(block, name) for name in _NORM_IN_RESIDUAL):
        return None, None
    return others[names[0]], others[names[1]]


def _norm_pair(norm: nn.Module | None, *readers: _Part | None) -> ScalePair | None:
    one_plus = None if norm is None or None in readers else _adds_one(norm)
    return None if one_plus is None else ScalePair(norm, sum((r.inputs for r in readers), ()), one_plus=one_plus)


def _value_pair(attention: _Part | None) -> ScalePair | None:
    """The values and the output projection, where attention only mixes tokens in between."""
    if attention is None or getattr(getattr(attention.module, "config", None), "clip_qkv", None) is not None:
        return None
    return _linear_pair(attention, "v_proj", "qkv_proj", 3)


def _gated_pair(mlp: _Part | None) -> ScalePair | None:
    """The half of a gated MLP without activation, and the down projection."""
    if mlp is None or not any(hasattr(mlp.module, name) for name in ("gate_proj", "gate_up_proj")):
        return None
    if any("limit" in name for name in vars(mlp.module)):  # it clamps what goes into the product
        return None
    return _linear_pair(mlp, "up_proj", "gate_up_proj", 2)


def _linear_pair(part: _Part, alone: str, fused: str, count: int) -> ScalePair | None:
    """The output layer, and the layer `alone` or the last of `count` equal parts of the layer `fused`."""
    width, layers = part.output.in_features, dict(part.module.named_children())
    if alone in layers:
        return ScalePair(layers[alone], (part.output,), rows=slice(0, layers[alone].out_features))
    if fused not in layers or layers[fused].out_features != count * width:
        return None
    return ScalePair(layers[fused], (part.output,), rows=slice((count - 1) * width, count * width))


def _is_sound(pair: ScalePair) -> bool:
    """Whether the shapes fit and all values are there to be changed, each of them once."""
    width = len(pair.previous.weight) if pair.rows is None else pair.rows.stop - pair.rows.start
    weights = [module.weight for module in (pair.previous, *pair.layers)]
    return (
        all(layer.in_features == width for layer in pair.layers)
        and all(type(w) is nn.Parameter and w.is_floating_point() and not w.is_meta for w in weights)
        and len({id(w) for w in weights}) == len(weights)
    )


@torch.no_grad()
def _adds_one(norm: nn.Module) -> bool | None:
    """Whether a norm multiplies by 1 + its weight (True) or by its weight (False); None if by neither.

    Found out by what it does to a probe in fp32 with other weights and biases put in its place.
    """
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.is_meta or parameters.keys() - {"weight", "bias"}:
        return None
    has_bias = "bias" in parameters
    x, gain, shift = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)

    def output(gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        values = {"weight": gain, "bias": shift} if has_bias else {"weight": gain}
        return functional_call(norm, values, (x[None],))[0]

    zeros = torch.zeros_like(x)
    try:
        at_zero, at_one, at_random = output(zeros, zeros), output(zeros + 1, zeros), output(gain, shift)
        unit = at_one - at_zero
    except Exception:  # whatever it raises, it is called in another way than a norm
        return None
    if unit.shape != x.shape or not bool((unit != 0).any()):
        return None
    for one_plus in (False, True):
        expected = torch.stack([unit * one_plus, unit * (gain + one_plus) + shift * has_bias])
        if torch.allclose(torch.stack([at_zero, at_random]), expected, rtol=1e-4, atol=1e-5):
            return one_plus
    return None


# applying a scale


@torch.no_grad()
def fold(pair: ScalePair, scale: torch.Tensor) -> torch.Tensor:
    """Divide the output of `pair.previous` by a scale and multiply the weight columns of its readers by it, in place.

    A norm is rounded first and the columns take what its dtype could hold, so that rounding 1 + weight does not change
    the function. The parameters stay the same objects.

    Args:
        pair: from `find_pairs`.
        scale: [in_features], finite and > 0, any float dtype.

    Returns:
        [in_features] fp32, the scale as the columns were multiplied by it.

    Raises:
        ValueError: the scale does not fit the pair, or a scaled value leaves the range of its dtype. Nothing was
            changed then.
    """
    scale = _checked_scale(scale, pair.in_features).to(pair.layers[0].weight.device)
    weight, bias = pair.previous.weight, getattr(pair.previous, "bias", None)
    factors: list[tuple[torch.Tensor, torch.Tensor]] = []
    gain = None
    if pair.rows is None:
        gain, scale = _divided_gain(weight, scale, pair.one_plus)
    else:
        factors.append((weight[pair.rows], 1 / scale[:, None]))
        bias = bias if bias is None else bias[pair.rows]
    if bias is not None:
        factors.append((bias[:, None], 1 / scale[:, None]))
    factors += [(layer.weight, scale[None]) for layer in pair.layers]
    finite = gain is None or bool(torch.isfinite(gain).all())
    if not finite or not all(_stays_finite(*change) for change in factors):
        raise ValueError(
            f"a scale from {float(scale.min()):.3g} to {float(scale.max()):.3g} leaves the range of {weight.dtype}; "
            "use smaller scales"
        )
    for tensor, factor in factors:
        tensor.mul_(factor)
    if gain is not None:
        weight.copy_(gain)
    return scale


def _divided_gain(weight: torch.Tensor, scale: torch.Tensor, one_plus: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of a norm with its gain divided by a scale, in its dtype, and by what it is divided after rounding.

    A gain that would become 0 by rounding stays as it is.
    """
    one = 1.0 if one_plus else 0.0
    gain = weight.float() + one
    new = (gain / scale - one).to(weight.dtype)
    new_gain = new.float() + one
    lost = (new_gain == 0) & (gain != 0)
    applied = torch.where(gain == 0, scale, torch.where(lost, torch.ones_like(scale), gain / new_gain))
    return torch.where(lost, weight, new), applied


def _stays_finite(tensor: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether tensor * factor, with factor [N, 1] or [1, K], is in the range of the tensor's dtype."""
    along = 1 if factor.shape[1] == 1 else 0
    largest = torch.linalg.vector_norm(tensor, float("inf"), dim=along, keepdim=True, dtype=torch.float32)
    return bool((largest * factor <= torch.finfo(tensor.dtype).max).all())


def scaled(statistics: Statistics, scale: torch.Tensor) -> Statistics:
    """Statistics of the inputs divided by a scale.

    Args:
        statistics: of the inputs x.
        scale: [in_features], finite and > 0.

    Returns:
        Statistics of x / scale: second_moment / a^2 and hessian / (a a^T), fp32.

    Raises:
        ValueError: the scale does not fit the statistics.
    """
    inverse = 1 / _checked_scale(scale, len(statistics.second_moment)).to(statistics.second_moment.device)
    hessian = statistics.hessian
    if hessian is not None:
        hessian = (hessian.float() * inverse).mul_(inverse[:, None])
    return Statistics(statistics.second_moment.float() * inverse.square(), statistics.tokens, hessian)


def _checked_scale(scale: torch.Tensor, in_features: int) -> torch.Tensor:
    if tuple(scale.shape) != (in_features,):
        raise ValueError(f"scale must have shape [{in_features}], got {list(scale.shape)}")
    scale = scale.detach().float()
    good = torch.isfinite(scale) & (scale > 0)
    if not bool(good.all()):
        raise ValueError(f"scale must be finite and > 0, got {float(scale[~good][0])}; give unscaled channels 1")
    return scale


# choosing a scale


@torch.no_grad()
def search_scale(weights: Sequence[torch.Tensor], statistics: Statistics, config: AAACConfig) -> torch.Tensor | None:
    """The scale with the least error of rounding all weights that share it, sum_nk h_k / a_k^2 (w_nk a_k - q_nk)^2.

    Candidates are powers m^r of the channels' root mean squares (the paper takes the mean of |x|), normalised by the
    geometric mean of their extremes. They are compared by the encoder's error on a sample of rows, with
    the NF4 book standing in for learned ones, which takes a tenth of the time; the best is returned only if the
    encoder that is asked for does better with it than without. A Hessian in the statistics is not looked at.

    Args:
        weights: [out_features, in_features] each, of any float dtype, all reading the same inputs.
        statistics: of these inputs.
        config: how the weights will be quantised.

    Returns:
        [in_features] fp32 scale, 1 for channels that were always 0; None if no scale is better than all ones.

    Raises:
        ValueError: no weights, or weights that differ in in_features, do not fit the statistics or cannot be
            quantised; see `encode`.
        TypeError: a weight is not floating-point.
    """
    if not weights:
        raise ValueError("weights is empty: give all weights that share the scale")
    exact = dataclasses.replace(config, rounding="nearest", step=None)
    quick = dataclasses.replace(exact, codebooks="nf4") if config.codebooks == "learned" else exact
    for weight in weights:
        check_weight(weight, exact)
    widths = [weight.shape[1] for weight in weights]
    if set(widths) != {len(statistics.second_moment)}:
        seen = len(statistics.second_moment)
        raise ValueError(
            f"weights of one scale must read the same inputs, got in_features {widths}, statistics of {seen}"
        )
    samples = [weight[:: ceil_div(weight.numel(), SAMPLE_WEIGHTS)].float() for weight in weights]
    seen = Statistics(statistics.second_moment.to(samples[0].device), statistics.tokens)
    one = torch.ones_like(samples[0][0])
    best, least = one, _error(samples, seen, one, quick)
    for ratio in RATIOS:
        scale = _candidate(seen.second_moment, ratio)
        error = _error(samples, seen, scale, quick)
        if error < least:
            best, least = scale, error
    if best is one or (quick is not exact and _error(samples, seen, best, exact) >= _error(samples, seen, one, exact)):
        return None
    return best


def _error(samples: list[torch.Tensor], seen: Statistics, scale: torch.Tensor, config: AAACConfig) -> float:
    after = scaled(seen, scale)
    return sum(float(encode(sample * scale, config, after).error) for sample in samples)


def _candidate(second_moment: torch.Tensor, ratio: float) -> torch.Tensor:
    """The normalised power of the channels' magnitudes, fp32 [K]; 1 for dead channels."""
    magnitude = second_moment.float().sqrt()
    alive = magnitude > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    power = (magnitude / magnitude[alive].mean()).pow(ratio).clamp(min=_SMALLEST)
    extremes = power[alive].aminmax()
    return torch.where(alive, power / (extremes.min * extremes.max).sqrt(), torch.ones_like(power))
