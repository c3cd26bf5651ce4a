"""Run the encoder's annealing kernel in Triton's interpreter, and print as JSON how far it is from plain fp64.

    TRITON_INTERPRET=1 python tests/annealing_in_interpreter.py SEED

Each result is {"kind", "case", "ratio"}: a difference over its bound. A right kernel has ratios up to 1; the results of
kind "broken" come from a damaged input and must be above 1.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from test_annealing import parts_of, problem

from aaac_ao.encode import annealing
from aaac_ao.kernels import annealing as kernel
from aaac_ao.kernels import verify

#: Columns, rows, group size, and the most columns of a launch: ragged groups, blocks and programs.
WEIGHTS = ((40, 5, 16, 256), (23, 6, 64, 256), (1, 3, 16, 256), (70, 7, 16, 32), (50, 5, 32, 32), (45, 6, 16, 40))
SWEEPS = 3


def plain(weight, hessian, grid, codes, pushes, heat, offset) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors after the sweeps by their definition, in fp64."""
    weight, hessian, pushes, heat = (part.double() for part in (weight, hessian, pushes, heat))
    codes, values = codes.clone(), grid.values(codes).double()
    for sweep in pushes:
        for i in range(len(weight)):
            group = i // grid.group_size
            entries = grid.codebooks.double()[grid.selector[group].long()].T * grid.scale[group].double()
            lost = values - weight
            lost[i] = 0
            best = weight[i] - hessian[i] @ lost / hessian[i, i]  # where the row's error is least
            pushed = best + heat * sweep[(offset + i) % len(weight)] / hessian[i, i].sqrt()
            codes[i] = (pushed - entries).abs().argmin(0)
            values[i] = entries.gather(0, codes[i][None].long())[0]
    lost = values - weight
    return codes, ((hessian @ lost) * lost).sum(0)


def compared(given, parts, pushes, heat, offset) -> dict[str, float]:
    """What the kernel makes of `parts` against what is right for the others, each difference over its bound."""
    weight, hessian, grid, codes = given
    right, error = plain(*given, pushes, heat, offset)
    lost = grid.values(codes).double() - weight.double()
    before = ((hessian.double() @ lost) * lost).sum(0)
    growth = kernel.anneal(*parts).double()
    values, new, pull = parts[:3]
    pulled = hessian @ (values - weight)
    same = (new == right).all(0)
    return {
        "codes": (~same).double().mean().item() / 0.2,  # a row that meets a tie goes its own way
        "growth": (((growth - error + before).abs() / (1e-4 * (error + before))) * same).max().item(),
        "values": 0.0 if torch.equal(values, grid.values(new)) else math.inf,
        "pull": ((pull - pulled).abs().max() / (1e-4 * (1 + pulled.abs().max()))).item(),
    }


def weight_results():
    for columns, rows, group_size, at_once in WEIGHTS:
        kernel.MOST_COLUMNS = at_once
        given = problem(columns, rows, group_size)
        parts = parts_of(*given, SWEEPS)
        case = f"K={columns} N={rows} g{group_size} by {at_once}"
        for kind, ratio in compared(given, parts, *parts[4:6], parts[9]).items():
            yield {"kind": kind, "case": case, "ratio": ratio}
    kernel.MOST_COLUMNS = 256


def repeated_results():
    """The same input twice."""
    parts = parts_of(*problem(23, 6, 16), SWEEPS)
    again = [part.clone() if isinstance(part, torch.Tensor) else part for part in parts]
    kernel.anneal(*parts)
    kernel.anneal(*again)
    same = all(torch.equal(*pair) for pair in zip(parts[:3], again[:3], strict=True))
    yield {"kind": "again", "case": "twice", "ratio": 0.0 if same else math.inf}


def check_results():
    """The encoder's check before it uses the kernel: whether both paths agree, and whether it sees where not."""
    whole = lambda: annealing.errors_of_both(kernel.anneal, torch.device("cpu"), 40, 16)  # noqa: E731
    fine = verify._compare("annealing", whole)
    yield {"kind": "check", "case": "whole", "ratio": 0.0 if fine else math.inf}

    def without_noise(*parts):
        return kernel.anneal(*parts[:5], torch.zeros_like(parts[5]), *parts[6:])

    broken = lambda: annealing.errors_of_both(without_noise, torch.device("cpu"), 40, 16)  # noqa: E731
    yield {"kind": "broken", "case": "check", "ratio": 0.0 if verify._compare("annealing", broken) else math.inf}


def broken_results():
    """The same comparison after a damage to what the kernel gets; the worst of its ratios."""
    for index, damage in (
        (2, lambda pull: pull * 1.5),
        (3, lambda metric: metric.triu()),
        (4, lambda pushes: pushes.flip(1)),
        (5, lambda heat: heat * 3),
        (6, lambda books: books.flip(0) + 0.05),
        (7, lambda scale: scale.flip(0)),
        (8, lambda selector: 1 - selector),
        (9, lambda offset: (offset + 7) % 24),
    ):
        given = problem(24, 8, 8)
        parts = parts_of(*given, SWEEPS)
        kept = [*parts[4:6], parts[9]]
        parts[index] = damage(parts[index]).contiguous()
        yield {"kind": "broken", "case": str(index), "ratio": max(compared(given, parts, *kept).values())}


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]))
    torch.set_num_threads(1)
    parts = (weight_results, repeated_results, check_results, broken_results)
    json.dump([result for part in parts for result in part()], sys.stdout, allow_nan=True)
