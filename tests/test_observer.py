"""The observing weight: right sums, untouched outputs, bounded state."""

import copy

import pytest
import torch
from torch import nn

from aaac_ao.observer import ObserverTensor


def observed(linear: nn.Linear, full: bool = False) -> nn.Linear:
    linear = copy.deepcopy(linear)
    linear.weight = nn.Parameter(ObserverTensor.from_hp(linear.weight, full), requires_grad=False)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_moments_and_outputs(dtype):
    linear = nn.Linear(70, 33, dtype=dtype)
    layer = observed(linear, full=True)
    batches = [torch.randn(3, 5, 70).to(dtype), torch.randn(70).to(dtype), torch.randn(9, 70).to(dtype) * 30]
    for x in batches:
        assert torch.equal(layer(x), linear(x))
    x = torch.cat([b.reshape(-1, 70) for b in batches]).double()
    statistics = layer.weight.sums.statistics()
    assert statistics.tokens == 25
    torch.testing.assert_close(statistics.second_moment.double(), x.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.weight.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_state_does_not_grow_with_data():
    layer = observed(nn.Linear(64, 32))
    before = {name: part.data_ptr() for name, part in vars(layer.weight.data).items() if isinstance(part, torch.Tensor)}
    for _ in range(5):
        layer(torch.randn(100, 64))
    after = vars(layer.weight.data)
    assert {name: after[name].data_ptr() for name in before} == before
    assert layer.weight.squares.dtype == torch.float32


def test_sums_of_two_runs_add_up():
    linear = nn.Linear(64, 32)
    whole, first, second = observed(linear), observed(linear), observed(linear)
    a, b = torch.randn(40, 64), torch.randn(7, 64)
    whole(a), whole(b), first(a), second(b)
    torch.testing.assert_close(whole.weight.squares, first.weight.squares + second.weight.squares)
    assert int(whole.weight.tokens) == int(first.weight.tokens) + int(second.weight.tokens)


def test_works_in_inference_mode_and_with_gradients():
    layer = observed(nn.Linear(64, 32))
    with torch.inference_mode():
        layer(torch.randn(4, 64))
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.hp_data.sum(0).expand(4, 64))
    assert int(layer.weight.tokens) == 8


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="0 batches seen"):
        observed(nn.Linear(64, 32)).weight.sums.statistics()


class UsesTheWeight(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_products_with_the_transposed_weight_are_observed():
    linear = UsesTheWeight(64, 32, bias=False)
    layer = observed(linear)
    x = torch.randn(2, 5, 64)
    assert torch.equal(layer(x), linear(x))
    torch.testing.assert_close(layer.weight.sums.statistics().second_moment, x.flatten(0, 1).square().mean(0))
    assert layer.weight.sums.statistics().tokens == 10


def test_other_uses_of_the_weight_see_the_plain_weight():
    linear = nn.Linear(64, 32)
    weight = observed(linear).weight
    assert torch.equal(weight * 2, linear.weight * 2)
    assert torch.equal(weight[3:7], linear.weight[3:7])
    assert int(weight.tokens) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_an_observed_model(dtype):
    layer = observed(nn.Linear(64, 32)).to(dtype)
    x = torch.randn(4, 64, dtype=dtype)
    assert layer(x).dtype == dtype
    assert layer.weight.squares.dtype == torch.float32
    torch.testing.assert_close(layer.weight.sums.statistics().second_moment, x.float().square().mean(0))


def test_attention_modules_run_while_observed():
    attention = nn.MultiheadAttention(64, 4)
    reference = copy.deepcopy(attention)
    attention.out_proj.weight = nn.Parameter(ObserverTensor.from_hp(attention.out_proj.weight), requires_grad=False)
    x = torch.randn(3, 2, 64)
    torch.testing.assert_close(attention(x, x, x)[0], reference(x, x, x)[0])
