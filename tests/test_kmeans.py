"""K-means and the nearest-entry search against plain loops."""

import numpy as np
import pytest
import torch

from aaac_ao.codebooks import learned_start, mirror
from aaac_ao.encode.kmeans import lloyd
from aaac_ao.encode.nearest import RANGE, NearestTable, nearest_codes

# k-means


def kmeans_objective(u, scale, importance, codebooks) -> float:
    """Exact objective: the book of a group by its weighted error, then s^2 times that error."""
    distance = (u.double()[..., None, None] - codebooks.double()).square().amin(-1)  # [rows, groups, size, books]
    errors = (distance * importance.double()[..., None]).sum(-2).amin(-1)
    return float((errors * scale.double().square()).sum())


def kmeans_case(rows: int = 32, groups: int = 4, size: int = 32):
    weight = torch.distributions.StudentT(4.0).sample((rows, groups, size))
    scale = weight.abs().amax(-1)
    importance = (torch.randn(groups, size) * 1.5).exp()
    return weight / scale[..., None], scale, importance, learned_start().sort(dim=1).values


def test_lloyd_never_raises_the_objective():
    u, scale, importance, books = kmeans_case()
    objective = [kmeans_objective(u, scale, importance, books)]
    for _ in range(15):
        books = lloyd(u, scale, importance, books, 1)
        objective.append(kmeans_objective(u, scale, importance, books))
    assert all(b <= a * 1.001 for a, b in zip(objective[:-1], objective[1:], strict=True)), objective
    assert objective[-1] < 0.95 * objective[0]


def test_lloyd_of_n_iterations_is_n_times_one():
    u, scale, importance, start = kmeans_case()
    step = start
    for _ in range(4):
        step = lloyd(u, scale, importance, step, 1)
    assert torch.equal(lloyd(u, scale, importance, start, 4), step)
    assert torch.equal(lloyd(u, scale, importance, start, 0), start)


def test_lloyd_moves_entries_to_weighted_means():
    """Brute force in plain loops, on weights that are centres of bins so that the table is exact."""
    _, scale, importance, start = kmeans_case(6, 2, 16)
    table = NearestTable(start, 1.0)
    u = table.centers[torch.randint(800, 3296, (6, 2, 16))]
    moved = lloyd(u, scale, importance, start, 1)

    book, values = start.double().numpy(), u.double().numpy()
    h, s = importance.double().numpy(), scale.double().numpy()
    total, moment = np.zeros((2, 16)), np.zeros((2, 16))
    for r in range(6):
        for g in range(2):
            distances = (values[r, g][:, None, None] - book) ** 2  # [size, books, entries]
            z = int((distances.min(-1) * h[g][:, None]).sum(0).argmin())
            for j, code in enumerate(distances[:, z].argmin(-1)):
                total[z, code] += h[g, j] * s[r, g] ** 2
                moment[z, code] += h[g, j] * s[r, g] ** 2 * values[r, g, j]
    empty = total == 0
    expected = np.where(empty, book, moment / np.where(empty, 1, total))
    np.testing.assert_allclose(moved.numpy(), np.sort(expected, axis=1), rtol=1e-6, atol=1e-7)


def test_lloyd_leaves_entries_without_mass():
    u, start = torch.full((4, 1, 16), 0.5), mirror(torch.linspace(-1, 1, 16)).sort(dim=1).values
    moved = lloyd(u, torch.ones(4, 1), torch.ones(1, 16), start, 3)
    assert (moved != start).sum() == 1
    untouched = lloyd(u, torch.zeros(4, 1), torch.ones(1, 16), start, 3)
    assert torch.equal(untouched, start)


def test_lloyd_weighs_groups_by_their_squared_scale():
    """Two groups that share one entry: it goes to the mean weighted with s^2, not to the middle."""
    u = torch.tensor([0.70, 0.80]).view(2, 1, 1).expand(2, 1, 16)
    start = torch.cat([torch.linspace(-1, 0, 15), torch.tensor([0.75])]).expand(2, 16)
    moved = lloyd(u, torch.tensor([[1.0], [3.0]]), torch.ones(1, 16), start, 1)
    assert moved[0, -1].item() == pytest.approx((0.70 + 9 * 0.80) / 10, abs=2e-3)


# nearest entries


def random_books(kind: str) -> torch.Tensor:
    if kind == "spread":
        books = torch.randn(2, 16) * 0.5
    elif kind == "closer than a bin":
        books = torch.randn(2, 1) * 0.3 + torch.randn(2, 16) * 1e-5
    elif kind == "duplicates":
        books = (torch.randn(2, 16) * 0.5)[:, torch.randint(5, (16,))]
    elif kind == "all equal":
        books = torch.randn(2, 1).expand(2, 16)
    else:
        books = torch.randn(2, 16) * 20  # far beyond the table
    return books.clamp(-50, 50).sort(dim=1).values.contiguous()


@pytest.mark.parametrize("kind", ["spread", "closer than a bin", "duplicates", "all equal", "beyond the table"])
def test_nearest_codes_are_exact(kind):
    for _ in range(20):
        books = random_books(kind)
        table = NearestTable(books, 1.0)
        for index, book in enumerate(books):
            midpoints = (book[1:] + book[:-1]) / 2
            far = torch.tensor([1e30, -1e30, 1.6, -1.6, 0.0])
            near = book[torch.randint(16, (200,))] + torch.randn(200) * 1e-5
            u = torch.cat([torch.randn(300), near, book, midpoints, far])
            codes = nearest_codes(u, table, book, index).long()
            distance = (u.double()[:, None] - book.double()).abs()
            slack = 1e-7 * (u.abs() + book.abs().max())  # a midpoint in fp32
            assert (distance.gather(1, codes[:, None])[:, 0] <= distance.amin(1) + slack).all()


def test_ties_go_to_the_lower_entry():
    """Multiples of 1/64, so that midpoints are exact: the first of the nearest, as in numpy."""
    book = (torch.randperm(128)[:16].sort().values - 64) / 64
    u = torch.arange(-256, 257) / 256
    codes = nearest_codes(u.view(27, 19), NearestTable(book.expand(2, 16), 1.0), book, 1)
    assert codes.shape == (27, 19)
    expected = np.abs(u.numpy()[:, None] - book.numpy()).argmin(-1)
    np.testing.assert_array_equal(codes.flatten().numpy(), expected)


@pytest.mark.parametrize("top", [1.0, 42.0])
def test_table_errors_are_those_of_the_bins_centre(top):
    books = random_books("spread") * top
    table = NearestTable(books, top)
    exact = (table.centers.double()[:, None, None] - books.double()).square().amin(-1).T
    torch.testing.assert_close(table.squared_error.double(), exact, rtol=1e-4, atol=1e-12 * top**2)
    u = (torch.rand(5, 3, 16) * 2 - 1) * RANGE * top
    centre = table.centers[table.bins(u).long()]
    assert ((centre - u).abs() <= table.step / 2 * 1.001).all()
    assert table.bins(torch.tensor([-1e30, 1e30])).tolist() == [0, 4095]

    h = torch.rand(3, 16)
    by_hand = (centre.double()[..., None, None] - books.double()).square().amin(-1) * h.double()[..., None]
    errors = table.group_errors(table.bins(u), h).double()
    torch.testing.assert_close(errors, by_hand.sum(-2).permute(2, 0, 1), rtol=1e-4, atol=1e-9)
