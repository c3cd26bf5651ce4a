"""From a weight and its input statistics to codes, scales, selectors and books: the only door into this package.

Pure numerics on plain tensors, on any device; knows nothing of torchao. The steps are numbered in `encode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from aaac_ao.codebooks import FIXED_CODEBOOKS, fixed_codebooks, learned_start, top_of
from aaac_ao.config import AAACConfig
from aaac_ao.encode.checks import check_second_order, check_weight, checked_moment
from aaac_ao.encode.kmeans import lloyd
from aaac_ao.encode.nearest import NearestTable, nearest_codes
from aaac_ao.encode.rows import OutputMetric
from aaac_ao.encode.scales import ScaleTable, few_matter, least_errors, reciprocal, search_scales
from aaac_ao.encode.second_order import INDEPENDENT, ONCE_CENTER, SecondOrder
from aaac_ao.formats import E4M3_MAX
from aaac_ao.heap import hand_back_memory
from aaac_ao.packing import ceil_div

#: Books are learned on at most this many weights (rows taken evenly): 32 numbers do not need more.
SAMPLE_WEIGHTS, ONCE_SAMPLE_WEIGHTS = 1 << 18, 1 << 17
#: Rows are worked on in chunks of about this many weights, which suits a CPU's cache and bounds the memory beyond the
#: result; accelerators, where every launch costs, take 32 times as many.
CHUNK_WEIGHTS = 1 << 16
#: Chunks whose rows are taken together where few of their groups are looked at.
MOST_CHUNKS = 8
#: Second-order rounding that leaves more than this share of its start's error tries a second start.
CLEAR_GAIN = 0.8
#: One row in so many, but no fewer weights than this, tell whether nearest rounding may be better than a single pass.
JUDGED_SHARE, JUDGED_WEIGHTS = 64, 1 << 14
#: Rounds of (scale search, short k-means) after the first k-means, and the updates of each.
REFINE_ROUNDS, ONCE_REFINE_ROUNDS, REFINE_ITERATIONS = 6, 2, 2
#: With learned books the largest group starts here and not at 448: the search may enlarge it by up to three codes.
LEARNED_LARGEST_E4M3 = 352.0
#: Share of the mean importance added to every channel, so that rarely active channels keep sensible codes.
IMPORTANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class Statistics:
    """What calibration knows about the inputs of a layer.

    Attributes:
        second_moment: [in_features] fp32, E[x_j^2]: the diagonal of the layer's output error.
        tokens: how many input vectors were seen.
        hessian: [in_features, in_features] fp32, E[x x^T]; only second-order rounding needs it.
    """

    second_moment: torch.Tensor
    tokens: int
    hessian: torch.Tensor | None = None

    _derived: dict[int, SecondOrder] = field(default_factory=dict, init=False, repr=False, compare=False)

    def second_order(self, group_size: int) -> SecondOrder:
        """What second-order rounding derives from the Hessian, computed once for all layers with these inputs."""
        if group_size not in self._derived:
            self._derived[group_size] = SecondOrder(self.hessian.float(), group_size)
        return self._derived[group_size]

    def give_up_hessian(self) -> None:
        """Free the Hessian, if nobody else holds it; what was derived from it stays."""
        object.__setattr__(self, "hessian", None)
        for derived in self._derived.values():
            del derived.hessian


@dataclass(frozen=True)
class Encoding:
    """A quantised weight before packing.

    Attributes:
        codes: [N, K] uint8, entries of the selected book.
        selector: [N, groups] bool, which book.
        scale: [N, groups] fp32 >= 0, exactly representable in the scale format.
        codebooks: [2, 16] fp32, ascending, exactly representable in bf16.
        per_tensor_scale: fp32 0-D, already contained in `scale`; None for bf16 scales.
        error: the objective, fp64 0-D: the sum over all weights of importance * (w - q)^2, or with second-order
            rounding sum_n (w_n - q_n)^T H (w_n - q_n), with w the target for these inputs, and H damped after a single
            pass; see `encode` for what an output metric makes of it.
    """

    codes: torch.Tensor
    selector: torch.Tensor
    scale: torch.Tensor
    codebooks: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    error: torch.Tensor


def encode(
    weight: torch.Tensor,
    config: AAACConfig,
    statistics: Statistics | None = None,
    output_shift: torch.Tensor | None = None,
    output_metric: OutputMetric | None = None,
    final: bool = False,
) -> Encoding:
    """Quantise a weight [out_features, in_features] with two books.

    Minimises sum_nk h_k (w_nk - q_nk)^2 with h = E[x^2] (1 without statistics):

    1. scales from the largest magnitude of each group;
    2. two books by weighted k-means, from a mirror pair;
    3. alternately, a joint search of scale and book per group and further k-means;
    4. books rounded to bf16, everything re-assigned exactly.

    The fixed grids stand as candidates: the result is never worse than any of them on this objective.

    With rounding="gptq", and with "auto" where the statistics hold a Hessian, the objective is the full
    sum_n (w_n - q_n)^T H (w_n - q_n), and codes and scales come from one pass: see `second_order`. Where a share of the
    rows tells that the above may lose less on this objective, as with weights that lie on a grid already, both are
    held against each other.
    "gptq-thorough" goes on from there, for many times as long, and is never worse than the above on this objective. So
    does "gptq" where inputs are so nearly independent that one pass may not be better.

    Args:
        weight: [out_features, in_features] of any float dtype.
        config: the settings.
        statistics: of the layer's inputs x.
        output_shift: [out_features, in_features] fp32, E[(y' - w x) x^T], with y' the output that the layer should
            give where that is not w x. Only second-order rounding uses it, as room for the corrected weight: it is
            overwritten.
        output_metric: M [out_features, out_features] of the outputs, for second-order rounding, whose objective
            becomes tr(M E H E^T) with E = w - q.
        final: nothing else will be encoded with these statistics, so that what is derived from them need not be kept,
            nor their Hessian: they may be without it afterwards.

    Raises:
        ValueError: the weight is not 2-D and finite, has fewer columns than a group, lies on the meta device, or the
            statistics do not fit it.
        TypeError: the weight is not floating-point.
    """
    check_weight(weight, config)
    importance = _importance(weight, config, statistics)
    if config.rounding == "nearest" or (
        config.rounding == "auto" and (statistics is None or statistics.hessian is None)
    ):
        return _first_order(weight, importance, config)
    check_second_order(config, statistics, output_shift, output_metric, weight)
    second_order = statistics.second_order(config.group_size)
    once = config.rounding != "gptq-thorough" and bool(second_order.news < INDEPENDENT)
    if final and once and output_metric is None:
        statistics.give_up_hessian()
    target = second_order.target(weight, output_shift)
    if once:
        groups = _Groups(target, config.group_size)
        start = _start(groups, _importance_of(second_order.importance, config), config)
        encoding = second_order.round_once(target, start, config, output_metric)
        if _nearest_may_lose_less(groups, importance, encoding, config):
            nearest = _best_encoding(groups, importance, config)
            nearest = second_order.with_error_of_once(target, nearest, config, output_metric)
            encoding = nearest if bool(nearest.error < encoding.error) else encoding
        if final:
            second_order.forget_factor()
        return encoding
    if final:  # the first-order encoder does without the factor, which takes less time than rounding with it
        second_order.forget_factor()

    def refined(importance: torch.Tensor) -> tuple[Encoding, torch.Tensor]:
        start = _first_order(target, importance, config)
        better, before = second_order.refine(target, start, config, output_metric, final)
        if better is None:
            better = dataclasses.replace(_first_order(target, importance, config), error=before)
        return better, before

    # not kept as a start for below, which is seldom needed: it is as large as the result
    plain_before = second_order.with_error(
        target, _first_order(target, importance, config), config, output_metric
    ).error
    encoding, before = refined(_importance_of(second_order.importance, config))
    if bool(encoding.error > CLEAR_GAIN * torch.minimum(before, plain_before)):
        # little was gained: the start for the diagonal alone may have been as good
        plain, _ = refined(importance)
        encoding = plain if bool(plain.error < encoding.error) else encoding
    return encoding


def _first_order(weight: torch.Tensor, importance: torch.Tensor, config: AAACConfig) -> Encoding:
    groups = _Groups(weight, config.group_size)
    return _best_encoding(groups, importance, config)


def _start(groups: _Groups, importance: torch.Tensor, config: AAACConfig) -> Encoding:
    """Books, learned on fewer weights, and scales to begin with; no codes yet."""
    weight, fmt = groups.weight, config.scale_format
    if config.codebooks == "learned":
        candidate = _learned(groups, importance, config, ONCE_SAMPLE_WEIGHTS, ONCE_REFINE_ROUNDS)
    else:
        candidate = _fixed(groups, importance, config, config.codebooks)
    unit_pts, pts = (fmt.per_tensor_scale(groups.amax, top, candidate.largest) for top in (1.0, candidate.top))
    scale = torch.cat([chunk.abs().amax(-1) for chunk in groups.chunks()])
    if config.scale_search:
        scale *= ONCE_CENTER
        few = few_matter(importance)  # five scales around this one may be too coarse to suit single weights
        if bool(few.any()):
            table = ScaleTable(candidate.books / candidate.top, fmt)
            found = [search_scales(chunk, importance[few], table, unit_pts) for chunk in groups.chunks(few)]
            scale[:, few] = torch.cat(found)
    scale = fmt.round(scale / candidate.top, pts)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    selector = torch.zeros(scale.shape, dtype=torch.bool, device=weight.device)
    return Encoding(codes, selector, scale, candidate.books, pts, scale.new_zeros((), dtype=torch.float64))


class _Groups:
    """A weight seen in chunks of rows, cut into groups; a partial last group is filled with zeros."""

    def __init__(self, weight: torch.Tensor, group_size: int) -> None:
        self.weight, self.group_size = weight.detach(), group_size
        self.rows, self.columns = weight.shape
        self.count = ceil_div(self.columns, group_size)
        chunk = CHUNK_WEIGHTS * (1 if weight.device.type == "cpu" else 32)
        self.chunk_rows = max(1, chunk // self.columns)
        low, high = weight.detach().aminmax()
        self.amax = torch.maximum(-low, high).float()

    def cut(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [rows, columns] of any float dtype as fp32 [rows, groups, group_size]."""
        padding = self.count * self.group_size - self.columns
        return torch.nn.functional.pad(rows.float(), (0, padding)).view(len(rows), self.count, self.group_size)

    def chunks(self, some: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """All rows in order, [rows, groups, group_size] at a time; of `some` groups [groups] bool more rows."""
        if some is None:
            yield from map(self.cut, self.weight.split(self.chunk_rows))
            return
        more = min(MOST_CHUNKS, self.count // int(some.sum()))
        for rows in self.weight.split(self.chunk_rows * more):
            yield self.cut(rows)[:, some]

    def sample(self, most: int) -> torch.Tensor:
        """Evenly spaced rows, at most about so many weights."""
        return self.cut(self.weight[:: ceil_div(self.rows * self.columns, most)])


def _importance(weight: torch.Tensor, config: AAACConfig, statistics: Statistics | None) -> torch.Tensor:
    """Importance of every input channel as [groups, group_size]; 0 in the filling of a partial group."""
    k = weight.shape[1]
    if statistics is None:
        h = torch.ones(k, dtype=torch.float32, device=weight.device)
    else:
        h = checked_moment(statistics, k).to(weight.device)
        mean = h.mean()
        h = torch.where(mean > 0, h + IMPORTANCE_FLOOR * mean, torch.ones_like(h))
    return _importance_of(h, config)


def _importance_of(h: torch.Tensor, config: AAACConfig) -> torch.Tensor:
    padding = -len(h) % config.group_size
    return torch.nn.functional.pad(h, (0, padding)).view(-1, config.group_size)


@dataclass(frozen=True)
class _Candidate:
    """A pair of books to encode with.

    Attributes:
        books: [2, 16], each ascending.
        top: magnitude onto which a group's largest weight is mapped.
        largest: the E4M3 scale of the largest group, before the search.
        select_by: [groups, group_size], the weights by which groups choose a scale and a book.
    """

    books: torch.Tensor
    top: float
    largest: float
    select_by: torch.Tensor


def _best_encoding(groups: _Groups, importance: torch.Tensor, config: AAACConfig) -> Encoding:
    """With the fixed pair that is asked for, or with the best of the learned and all fixed ones."""
    if config.codebooks != "learned":
        return _assign(groups, importance, _fixed(groups, importance, config, config.codebooks), config)
    learned = _learned(groups, importance, config, SAMPLE_WEIGHTS, REFINE_ROUNDS)
    hand_back_memory()
    best = _assign(groups, importance, learned, config)
    bounds = _lower_bounds(groups.chunks(), groups.amax, importance, config, _fixed_pairs(config))
    for name, bound in zip(FIXED_CODEBOOKS, bounds, strict=True):
        if bound < float(best.error):
            rival = _assign(groups, importance, _fixed(groups, importance, config, name), config)
            best = rival if bool(rival.error < best.error) else best
    return best


def _nearest_may_lose_less(groups: _Groups, importance: torch.Tensor, encoding: Encoding, config: AAACConfig) -> bool:
    """Whether rounding to nearest may lose less than an encoding from `_start`, as a share of the rows tells.

    Errors of rounding to nearest add up as if inputs were independent: their signs are those of chance.
    """
    sample = groups.sample(max(groups.weight.numel() // JUDGED_SHARE, JUDGED_WEIGHTS))
    bounds = partial(_lower_bounds, sample.split(groups.chunk_rows), groups.amax, importance, config)
    least = min(bounds(_fixed_pairs(config)))
    if config.codebooks == "learned":
        least = min(least, *bounds(encoding.codebooks[None], LEARNED_LARGEST_E4M3))
    return least * groups.rows < float(encoding.error) * len(sample)


def _fixed_pairs(config: AAACConfig) -> torch.Tensor:
    """[pairs, 2, 16] the fixed pairs that weights are tried with, each book ascending and with a `top` of 1."""
    names = FIXED_CODEBOOKS if config.codebooks == "learned" else (config.codebooks,)
    return torch.stack([fixed_codebooks(n, config.group_size).sort(dim=1).values / top_of(n) for n in names])


def _lower_bounds(
    chunks: Iterable[torch.Tensor],
    amax: torch.Tensor,
    importance: torch.Tensor,
    config: AAACConfig,
    pairs: torch.Tensor,
    largest: float = E4M3_MAX,
) -> list[float]:
    """What the error of each pair [pairs, 2, 16] cannot be below, from one pass for all: most need not be tried."""
    if not config.scale_search:  # the bounds are about the scales of the search
        return [0.0] * len(pairs)
    fmt, device = config.scale_format, amax.device
    books, index = torch.unique(pairs.flatten(0, 1), dim=0, return_inverse=True)  # IF4 is made of FP4 and INT4
    first, second = index.view(-1, 2).to(device).unbind(1)
    table = ScaleTable(books.to(device), fmt, lower_bounds=True)
    pts = fmt.per_tensor_scale(amax, top=1.0, largest=largest)
    total = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    for chunk in chunks:
        errors, unit = (x.flatten(0, 1) for x in least_errors(chunk, importance, table, pts))
        errors = torch.minimum(errors[:, first], errors[:, second])
        total += unit.double().square() @ errors.double()
    return total.tolist()


def _learned(
    groups: _Groups, importance: torch.Tensor, config: AAACConfig, sample_weights: int, rounds: int
) -> _Candidate:
    fmt = config.scale_format
    pts = fmt.per_tensor_scale(groups.amax, top=1.0, largest=LEARNED_LARGEST_E4M3)
    sample = groups.sample(sample_weights)
    scale = fmt.round(sample.abs().amax(-1), pts)
    books = learned_start().float().to(sample.device).sort(dim=1).values
    books = lloyd(sample * reciprocal(scale)[..., None], scale, importance, books, config.iterations)
    for _ in range(rounds if config.scale_search else 0):
        table = ScaleTable(books, fmt)
        found = [search_scales(chunk, importance, table, pts) for chunk in sample.split(groups.chunk_rows)]
        scale = fmt.round(torch.cat(found), pts)
        books = lloyd(sample * reciprocal(scale)[..., None], scale, importance, books, REFINE_ITERATIONS)
    return _Candidate(books.bfloat16().float(), 1.0, LEARNED_LARGEST_E4M3, importance)


def _fixed(groups: _Groups, importance: torch.Tensor, config: AAACConfig, name: str) -> _Candidate:
    """A fixed pair; without a scale search the book is chosen by plain squared error, as round-to-nearest does."""
    books = fixed_codebooks(name, config.group_size).to(groups.weight.device).sort(dim=1).values
    select_by = importance if config.scale_search else (importance > 0).float()
    return _Candidate(books, top_of(name), E4M3_MAX, select_by)


def _encoded_chunks(
    groups: _Groups, importance: torch.Tensor, candidate: _Candidate, config: AAACConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Exact codes, selectors, scales and the error of one chunk of rows after the other."""
    books, top, select_by, fmt = candidate.books, candidate.top, candidate.select_by, config.scale_format
    unit_pts, pts = (fmt.per_tensor_scale(groups.amax, t, candidate.largest) for t in (1.0, top))
    nearest = NearestTable(books, top)
    table = ScaleTable(books / top, fmt) if config.scale_search else None
    for chunk in groups.chunks():
        scale = chunk.abs().amax(-1) if table is None else search_scales(chunk, select_by, table, unit_pts)
        scale = fmt.round(scale / top, pts)
        u = chunk * reciprocal(scale)[..., None]
        both = [nearest_codes(u, nearest, book, index) for index, book in enumerate(books)]
        values = [torch.index_select(book, 0, codes.view(-1)) for book, codes in zip(books, both, strict=True)]
        squared = [(value.view(u.shape) - u).square_() for value in values]
        selector = torch.lt(*[(part * select_by).sum(-1) for part in reversed(squared)])
        codes = torch.where(selector[..., None], both[1], both[0]).flatten(1)[:, : groups.columns]
        errors = [(part * importance).sum(-1) for part in squared]
        # the square of a scale may leave the range of fp32
        error = (torch.where(selector, errors[1], errors[0]).double() * scale.double().square()).sum()
        yield codes, selector, scale, error


def _assign(groups: _Groups, importance: torch.Tensor, candidate: _Candidate, config: AAACConfig) -> Encoding:
    """The encoding of the whole weight; nothing but the result is held beyond a chunk."""
    device, rows = groups.weight.device, groups.rows
    codes = torch.empty(rows, groups.columns, dtype=torch.uint8, device=device)
    selector = torch.empty(rows, groups.count, dtype=torch.bool, device=device)
    scale = torch.empty(rows, groups.count, dtype=torch.float32, device=device)
    errors, start = [], 0
    for part in _encoded_chunks(groups, importance, candidate, config):
        stop = start + len(part[0])
        codes[start:stop], selector[start:stop], scale[start:stop] = part[:3]
        errors.append(part[3])
        start = stop
    pts = config.scale_format.per_tensor_scale(groups.amax, candidate.top, candidate.largest)
    return Encoding(codes, selector, scale, candidate.books, pts, torch.stack(errors).sum())
