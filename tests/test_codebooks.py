"""The fixed books against their definitions."""

import math
import statistics

import pytest
import torch

from aaac_ao.codebooks import FIXED_CODEBOOKS, fixed_codebooks, learned_start, mirror, top_of

E2M1 = [m * 2.0**e for e, m in ((0, 0), (0, 0.5), (0, 1), (0, 1.5), (1, 1), (1, 1.5), (2, 1), (2, 1.5))]
GROUP_SIZES = (16, 32, 64, 128)


def normal_float() -> list[float]:
    """NF4 from its definition (QLoRA, appendix E): quantiles of the normal, 7 negative, a zero, 8 positive."""
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    return sorted(x / max(positive) for x in [*positive, 0.0, *negative])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("name", FIXED_CODEBOOKS)
def test_books_are_exact_in_bf16_and_reach_their_top(name, group_size):
    pair = fixed_codebooks(name, group_size)
    assert pair.shape == (2, 16)
    assert pair.dtype == torch.float32
    assert torch.equal(pair, pair.bfloat16().float())
    assert (pair.abs() == top_of(name)).any(1).all()
    beyond = (pair.abs() > top_of(name)).sum().item()
    assert beyond == {"int4": 2, "if4": 1}.get(name, 0)  # -8 of INT4 lies beyond its 7


@pytest.mark.parametrize("name", ["int4", "fp4", "nf4", "bof4"])
def test_grids_of_one_book_are_returned_twice(name):
    first, second = fixed_codebooks(name, 32)
    assert torch.equal(first, second)


def test_int4_is_minus_8_to_7():
    assert fixed_codebooks("int4", 32)[0].tolist() == list(range(-8, 8))


def test_fp4_is_e2m1():
    assert sorted(fixed_codebooks("fp4", 16)[0].tolist()) == sorted(E2M1 + [-x for x in E2M1])


def test_fp4_is_symmetric():
    book = fixed_codebooks("fp4", 16)[0]
    assert torch.equal(book, -book.flip(0))


def test_if4_is_fp4_and_six_sevenths_of_int4():
    """In one unit: book 0 is FP4 and book 1 INT4 * 6/7, both times 7, with no rounding at all."""
    fp4, int4 = fixed_codebooks("if4", 16).double()
    assert torch.equal(fp4, 7 * fixed_codebooks("fp4", 16)[0].double())
    assert torch.equal(int4, 6 * fixed_codebooks("int4", 16)[0].double())


def test_nf4_follows_its_definition():
    exact = torch.tensor(normal_float())
    torch.testing.assert_close(learned_start()[0], exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed_codebooks("nf4", 64)[0], exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "bof4", "bof4-s"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_one_ended_books_ascend_through_zero(name, group_size):
    book = fixed_codebooks(name, group_size)[0]
    assert (book.diff() > 0).all()
    assert (book[7], book[-1]) == (0, 1)
    assert math.isclose(book[0], -1) == (name != "bof4-s")


@pytest.mark.parametrize(("name", "group_size"), [("bof4", 64), ("bof4-s", 32), ("bof4-s", 64), ("bof4-s", 128)])
def test_bof4_entries_are_centroids_of_normalised_gaussians(name, group_size):
    """BOF4's definition, simulated: every free entry is the mean of its cell, weighted with the squared absmax."""
    blocks = torch.randn(1_500_000 // group_size, group_size)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    absmax = largest if name == "bof4-s" else largest.abs()
    u, mass = (blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten()
    book = fixed_codebooks(name, group_size)[0]
    cell = torch.bucketize(u, (book[1:] + book[:-1]) / 2)
    means = torch.bincount(cell, mass * u, 16) / torch.bincount(cell, mass, 16)
    free = (book != 0) & (book.abs() != 1)
    torch.testing.assert_close(book[free], means[free], rtol=0, atol=0.005)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bof4_s_is_a_mirror_pair(group_size):
    book, mirrored = fixed_codebooks("bof4-s", group_size)
    assert torch.equal(mirrored, -book)


def test_bof4_s_knows_the_block_size():
    books = {g: fixed_codebooks("bof4-s", g)[0] for g in GROUP_SIZES}
    assert torch.equal(books[16], books[32])
    # the larger a block, the smaller its other weights are against the largest
    inner = slice(1, 7)
    assert (books[32][inner] < books[64][inner]).all()
    assert (books[64][inner] < books[128][inner]).all()


def test_learned_start_is_an_asymmetric_mirror_pair():
    book, mirrored = learned_start()
    assert torch.equal(mirrored, -book)
    assert not torch.equal(book.sort().values, mirrored.sort().values)


def test_mirror():
    book = torch.randn(16)
    assert torch.equal(mirror(book), torch.stack([book, -book]))


@pytest.mark.parametrize("name", ["int5", "", "learned", "FP4"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match=repr(name)) as error:
        fixed_codebooks(name, 32)
    assert all(repr(known) in str(error.value) for known in (*FIXED_CODEBOOKS, "learned"))
