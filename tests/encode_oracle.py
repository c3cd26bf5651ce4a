"""fp64 oracles shared by the tests of the formats and of the encoder; they use nothing but an `Encoding`'s fields."""

import sys
from importlib.metadata import version

import pytest
import torch

from aaac_ao import Statistics
from aaac_ao.formats import load_scale

#: Every positive finite value of the two scale dtypes, from their bit patterns.
POSITIVE_E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
POSITIVE_BF16 = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double()


def nearest_of(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The nearest of `values` for every x, by exhaustive search in fp64."""
    return values[(x.double()[..., None] - values).abs().argmin(-1)]


def statistics_of(x: torch.Tensor) -> Statistics:
    """Statistics of inputs [tokens, K], Hessian included."""
    hessian = x.T @ x / len(x)
    return Statistics(hessian.diagonal().clone(), len(x), hessian)


def correlated(tokens: int, k: int) -> torch.Tensor:
    """Inputs whose channels move together, some of them large."""
    return torch.randn(tokens, k) @ (torch.eye(k) + 1.5 * torch.randn(k, k) / k**0.5) * torch.randn(k).exp()


def damp(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """H with a share of its mean diagonal on the diagonal."""
    return hessian + torch.eye(len(hessian)) * share * hessian.diagonal().mean()


def upper_root(matrix: torch.Tensor) -> torch.Tensor:
    """R, upper, of M = R R^T."""
    return torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)


def importance_of(statistics, columns: int) -> torch.Tensor:
    """H = E[x^2] plus a thousandth of its mean, fp64; 1 without statistics or when no channel was ever active."""
    if statistics is None or float(statistics.second_moment.double().sum()) == 0:
        return torch.ones(columns, dtype=torch.float64)
    h = statistics.second_moment.double()
    return h + 1e-3 * h.mean()


def cut(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., columns] as fp64 [..., groups, group_size], the last group filled with zeros."""
    filling = -x.shape[-1] % group_size
    return torch.nn.functional.pad(x.double(), (0, filling)).unflatten(-1, (-1, group_size))


def dequantised(encoding, group_size: int) -> torch.Tensor:
    group = torch.arange(encoding.codes.shape[1]) // group_size
    book = encoding.codebooks.double()[encoding.selector.long()[:, group]]
    return encoding.scale.double()[:, group] * book.gather(-1, encoding.codes.long()[..., None]).squeeze(-1)


def hessian_errors(encoding, weight, hessian, group_size: int) -> torch.Tensor:
    """(w - q)^T H (w - q) of every row."""
    error = weight.double() - dequantised(encoding, group_size)
    return ((error @ hessian.double()) * error).sum(1)


def weighted_error(weight, encoding, group_size: int, importance) -> float:
    return float(((weight.double() - dequantised(encoding, group_size)).square() * importance).sum())


def best_group_errors(weight, scale, codebooks, group_size: int, importance) -> torch.Tensor:
    """[books, rows, groups]: weighted error of every group under each book with exhaustively chosen codes."""
    u, h = cut(weight, group_size), cut(importance, group_size)
    entries = scale.double()[..., None, None] * codebooks.double()[:, None, None, None, :]
    return ((u[..., None] - entries).square().amin(-1) * h).sum(-1)


ENCODE = sys.modules["aaac_ao.encode.encode"]  # the package's attribute `encode` is the function
FORMAT_GROUPS = [("int4", 128), ("int4", 64), ("int4", 32), ("nvfp4", 16)]
BOTH_FORMATS = [("int4", 32), ("nvfp4", 16)]
all_formats = pytest.mark.parametrize(("fmt", "group_size"), FORMAT_GROUPS)
both_formats = pytest.mark.parametrize(("fmt", "group_size"), BOTH_FORMATS)


def outlier(n, k):
    weight = torch.randn(n, k)
    weight[torch.randint(n, ()), torch.randint(k, ())] = 1e4
    return weight


def with_zeros(n, k):
    """All-zero rows, and one all-zero group."""
    weight = torch.randn(n, k)
    weight[::3] = 0
    weight[1, :128] = 0
    return weight


def dead_rows(n, k):
    """Rows that decayed to subnormal numbers, whose scales have no finite reciprocal."""
    weight = torch.randn(n, k)
    weight[1::2] *= 1e-39
    return weight


WEIGHTS = {
    "gaussian": torch.randn,
    "heavy-tail": lambda n, k: torch.distributions.StudentT(3.0).sample((n, k)),
    "uniform": lambda n, k: 2 * torch.rand(n, k) - 1,
    "one-sided": torch.rand,
    "sparse": lambda n, k: torch.randn(n, k) * (torch.rand(n, k) < 0.05),
    "one-row": lambda n, k: torch.randn(1, k),
    "constant": lambda n, k: torch.full((n, k), float(torch.randn(()))),
    "all-zero": torch.zeros,
    "zero-rows": with_zeros,
    "dead-rows": dead_rows,
    "outlier": outlier,
    "uneven-rows": lambda n, k: torch.randn(n, k) * torch.logspace(-6, 6, n)[:, None],
    "tiny": lambda n, k: torch.randn(n, k) * 1e-30,
    "huge": lambda n, k: torch.randn(n, k) * 1e30,
    "largest": lambda n, k: torch.randn(n, k).clamp(-1, 1) * 3.4e38,
    "bf16": lambda n, k: torch.randn(n, k).bfloat16(),
    "fp16": lambda n, k: torch.randn(n, k).half(),
}


def random_statistics(k: int) -> Statistics:
    """Second moments over three orders of magnitude."""
    return Statistics((torch.randn(k) * 2).exp(), 100)


def storable(fmt: str, encoding) -> torch.Tensor:
    """All positive scales that this encoding may use, fp64."""
    if fmt == "nvfp4":
        return (POSITIVE_E4M3.float() * encoding.per_tensor_scale).double()
    return POSITIVE_BF16


def rounding(error: float, weight, importance) -> float:
    """How far a weighted error may be off if every weight is read with a relative error of 2e-7, as fp32 does."""
    energy = float((weight.double().square() * importance).sum())
    return 1e-5 * error + 2 * 2e-7 * (error * energy) ** 0.5 + 4e-14 * energy


def check_encoding(weight, encoding, config, statistics=None):
    """Everything that must hold for every encoding, whatever the weight."""
    (n, k), group_size = weight.shape, config.group_size
    groups = -(-k // group_size)
    assert (encoding.codes.shape, encoding.codes.dtype) == ((n, k), torch.uint8)
    assert (encoding.selector.shape, encoding.selector.dtype) == ((n, groups), torch.bool)
    assert (encoding.scale.shape, encoding.scale.dtype) == ((n, groups), torch.float32)
    assert encoding.codes.max() < 16
    books = encoding.codebooks
    assert books.shape == (2, 16)
    assert torch.equal(books, books.bfloat16().float())
    assert (books.diff() >= 0).all()
    assert (encoding.per_tensor_scale is not None) == (config.format == "nvfp4")

    allowed = torch.cat([storable(config.format, encoding), torch.zeros(1, dtype=torch.float64)])
    assert torch.isin(encoding.scale.double(), allowed).all()
    magnitude, selector = load_scale(
        config.scale_format.store(encoding.scale, encoding.selector, encoding.per_tensor_scale)
    )
    unit = 1.0 if encoding.per_tensor_scale is None else encoding.per_tensor_scale
    assert torch.equal(magnitude * unit, encoding.scale)
    assert torch.equal(selector, encoding.selector)

    q = dequantised(encoding, group_size)
    assert torch.isfinite(q).all()
    assert (q[weight == 0].abs() <= weight.abs().max().double()).all()
    importance = importance_of(statistics, k)
    error = weighted_error(weight, encoding, group_size, importance)
    assert abs(encoding.error.item() - error) <= rounding(error, weight, importance)

    scale = encoding.scale.double()
    normal = scale >= torch.finfo(torch.float32).tiny
    # codes: no entry of the selected book is nearer
    group = torch.arange(k) // group_size
    entries = (scale[..., None] * books.double()[encoding.selector.long()])[:, group]
    w = weight.double()
    nearest = (entries - w[..., None]).abs().amin(-1)
    slack = 1e-6 * (w.abs() + entries.abs().amax(-1))
    assert ((q - w).abs() <= nearest + slack)[normal[:, group]].all()
    # selectors: the other book is not better at this scale
    errors = best_group_errors(weight, scale, books, group_size, importance)
    chosen = errors.gather(0, encoding.selector.long()[None])[0]
    if config.scale_search or config.codebooks == "learned":
        assert (chosen <= errors.amin(0) * (1 + 1e-4) + 1e-12 * cut(w.square() * importance, group_size).sum(-1))[
            normal
        ].all()


def torchao_version() -> tuple[int, int]:
    """Major and minor version of the torchao that is installed."""
    return tuple(int(part) for part in version("torchao").split(".")[:2])
