"""fp64 oracles shared by the tests of the formats and of the encoder; they use nothing but an `Encoding`'s fields."""

import torch

#: Every positive finite value of the two scale dtypes, from their bit patterns.
POSITIVE_E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
POSITIVE_BF16 = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double()


def nearest_of(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The nearest of `values` for every x, by exhaustive search in fp64."""
    return values[(x.double()[..., None] - values).abs().argmin(-1)]


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


def weighted_error(weight, encoding, group_size: int, importance) -> float:
    return float(((weight.double() - dequantised(encoding, group_size)).square() * importance).sum())


def best_group_errors(weight, scale, codebooks, group_size: int, importance) -> torch.Tensor:
    """[books, rows, groups]: weighted error of every group under each book with exhaustively chosen codes."""
    u, h = cut(weight, group_size), cut(importance, group_size)
    entries = scale.double()[..., None, None] * codebooks.double()[:, None, None, None, :]
    return ((u[..., None] - entries).square().amin(-1) * h).sum(-1)
