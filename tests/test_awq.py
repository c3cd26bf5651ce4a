"""AWQ: which layers share a scale, that folding it changes nothing, and that the scale found is worth it."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, Statistics
from aaac_ao.awq import ScalePair, find_pairs, fold, scaled, search_scale
from aaac_ao.blocks import find_blocks
from aaac_ao.encode import encode

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GATED = [("up_proj", ("down_proj",))]
LLAMA = [("input_layernorm", QKV), ("v_proj", ("o_proj",)), ("post_attention_layernorm", MLP), *GATED]
GEMMA = [("input_layernorm", QKV), ("v_proj", ("o_proj",)), ("pre_feedforward_layernorm", MLP), *GATED]
PHI3 = [
    ("input_layernorm", ("qkv_proj",)),
    ("qkv_proj", ("o_proj",)),
    ("post_attention_layernorm", ("gate_up_proj",)),
    ("gate_up_proj", ("down_proj",)),
]
#: What is in a block of each model, and which pairs that makes.
FAMILIES = {
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Mistral": LLAMA,
    "Granite": LLAMA,
    "Gemma": LLAMA,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Phi": [("input_layernorm", (*QKV, "fc1")), ("v_proj", ("dense",))],
    "Phi3": PHI3,
    "Glm4": [LLAMA[0], LLAMA[1], *PHI3[2:]],
    "GPTNeoX": [("input_layernorm", ("query_key_value",)), ("post_attention_layernorm", ("dense_h_to_4h",))],
    "Cohere": [("input_layernorm", (*QKV, *MLP)), LLAMA[1], *GATED],
    # norms after attention and MLP alone: nothing to fold into
    "Olmo2": [LLAMA[1], *GATED],
    # experts, and the router that reads the same norm
    "Mixtral": LLAMA[:2],
    # the output of its norms goes on in the residual stream
    "MiniMax": [LLAMA[1]],
}


def make(family: str, heads: int = 4):
    """A small random model in fp32 with norms and biases that are not trivial."""
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**SIZES | {"num_key_value_heads": heads})
    for name, value in {"num_local_experts": 2, "layer_types": ["full_attention"] * 2}.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1))
    return model


def names_of(block: nn.Module) -> list:
    name = {module: path.split(".")[-1] for path, module in block.named_modules()}
    return [(name[pair.previous], tuple(name[layer] for layer in pair.layers)) for pair in find_pairs(block)]


def random_scale(size: int) -> torch.Tensor:
    return (0.7 * torch.randn(size)).exp()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_models_stay_the_same_function(family):
    model, ids = make(family), torch.randint(1, 61, (2, 9))
    before, old = logits(model, ids), copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for block, old_block in zip(find_blocks(model), find_blocks(old), strict=True):
        state = torch.get_rng_state()
        assert names_of(block) == FAMILIES[family]
        assert torch.equal(torch.get_rng_state(), state)
        for pair, old_pair in zip(find_pairs(block), find_pairs(old_block), strict=True):
            fold(pair, random_scale(pair.in_features))
            for layer, old_layer in zip(pair.layers, old_pair.layers, strict=True):
                assert not torch.allclose(layer.weight, old_layer.weight, rtol=0.1)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi", "Phi3"])
def test_one_side_of_a_fold_alone_is_seen(family):
    """What the test above compares does depend on every pair."""
    model, ids = make(family), torch.randint(1, 61, (2, 9))
    before = logits(model, ids)
    for pair in [pair for block in find_blocks(model) for pair in find_pairs(block)]:
        weight, scale = pair.previous.weight, random_scale(pair.in_features)
        kept, rows = weight.detach().clone(), pair.rows or slice(None)
        weight.data[rows] = weight.data[rows] * (scale[:, None] if weight.dim() == 2 else scale)
        assert (logits(model, ids) - before).abs().max() > 1e-3 * before.abs().max()
        weight.data.copy_(kept)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3", "Phi", "Phi3"])
def test_shared_values_are_not_paired_with_the_output(family):
    model, ids = make(family, heads=2), torch.randint(1, 61, (2, 9))
    before = logits(model, ids)
    for block in find_blocks(model):
        assert names_of(block) == [pair for pair in FAMILIES[family] if pair[1] not in [("o_proj",), ("dense",)]]
        for pair in find_pairs(block):
            fold(pair, random_scale(pair.in_features))
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


class Odd(nn.Module):
    """Behaves as a norm or linear layer, but for its weight."""

    def __init__(self, size: int, power: int = 2) -> None:
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.rand(size) + 0.5), power

    def forward(self, x, *more):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.weight**self.power


class GatedNorm(Odd):
    def forward(self, x, gate):
        return super().forward(x) * gate


class OddLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.tanh())


def with_part(path: str, part):
    def change(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, part)

    return change


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (with_part("input_layernorm", Odd(32)), [0]),
        (with_part("input_layernorm", Odd(32, power=1)), []),
        (with_part("input_layernorm", nn.LayerNorm(32)), []),
        (with_part("input_layernorm", nn.LayerNorm(32, elementwise_affine=False)), [0]),
        (with_part("input_layernorm", GatedNorm(32)), [0]),
        (with_part("input_layernorm", nn.Identity()), [0, 2]),
        (with_part("another_norm", nn.LayerNorm(32)), [0, 2]),
        (with_part("router", nn.Linear(32, 4)), [0, 2]),
        (with_part("residual_scale", nn.Parameter(torch.ones(32))), [0, 2]),
        (with_part("attn_alpha_factor", 1.0), [0, 2]),
        (with_part("dropout", nn.Dropout(0.1)), []),
        (with_part("self_attn.v_norm", nn.LayerNorm(8)), [0, 1]),
        (with_part("self_attn.q_norm", nn.LayerNorm(8)), []),
        (with_part("self_attn.gate_proj", nn.Linear(32, 32)), [0, 1]),
        (with_part("self_attn.v_proj", OddLinear(32, 32)), [0, 1]),
        (with_part("self_attn.sinks", nn.Parameter(torch.ones(4))), [0, 1]),
        (with_part("self_attn.config", transformers.OlmoConfig(clip_qkv=1.0)), [1]),
        (with_part("mlp.sub_norm", nn.LayerNorm(40)), [2, 3]),
        (with_part("mlp.down_proj", OddLinear(40, 32)), [2, 3]),
        (with_part("mlp.up_proj", nn.Linear(32, 40, device="meta")), [2, 3]),
        (with_part("mlp.swiglu_limit", 7.0), [3]),
        (lambda block: setattr(block.mlp.gate_proj, "weight", block.mlp.up_proj.weight), [2]),
        (lambda block: delattr(block, "mlp"), [0, 2, 3]),
    ],
)
def test_what_is_not_certain_is_left_out(change, gone):
    block = find_blocks(make("Llama"))[0]
    change(block)
    expected = [pair for index, pair in enumerate(LLAMA) if index not in gone]
    if len(gone) == 3:  # without an MLP, norms of both kinds are still there
        expected = LLAMA[:2]
    assert names_of(block) == expected


def test_quantised_layers_are_left_out():
    block = find_blocks(make("Llama"))[0]
    quantize_(block, AAACConfig(group_size=32), lambda module, name: name == "mlp.up_proj")
    assert names_of(block) == LLAMA[:2]


@pytest.mark.parametrize("one_plus", [False, True])
def test_rounding_of_a_norm_is_made_up_for(one_plus):
    """Small gains 1 + w are coarse in bf16: the product with the columns has to stay."""
    norm, layer = nn.LayerNorm(64), nn.Linear(64, 8)
    norm.weight.data = (random_scale(64) - float(one_plus)).bfloat16()
    norm.weight.data[0] = 1e-9
    norm.bias.data = torch.randn(64).bfloat16()
    before = layer.weight.detach().double() * (norm.weight.detach().double() + one_plus)
    shift = layer.weight.detach().double() * norm.bias.detach().double()
    scale = random_scale(64) * 8
    applied = fold(ScalePair(norm, (layer,), one_plus=one_plus), scale)
    after = layer.weight.detach().double() * (norm.weight.detach().double() + one_plus)
    assert norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.weight.double() * norm.bias.double(), shift, rtol=2**-8, atol=0)
    kept = applied == 1
    assert kept.double().mean() < 0.5
    torch.testing.assert_close(applied[~kept], scale[~kept], rtol=0.5, atol=0)


def test_bad_scales_change_nothing():
    block = find_blocks(make("Phi3"))[0].half()
    before = copy.deepcopy(block.state_dict())
    for pair in find_pairs(block):
        good = torch.ones(pair.in_features)
        for bad in (good[1:], good[None], good * 0, -good, good / 0, good * torch.nan):
            with pytest.raises(ValueError, match="scale must"):
                fold(pair, bad)
        for factor in (1e7, 1e-7):
            with pytest.raises(ValueError, match="leaves the range of torch"):
                fold(pair, good * factor)
    assert all(torch.equal(block.state_dict()[name], value) for name, value in before.items())


# statistics and search


def statistics_of(x: torch.Tensor, full: bool = False) -> Statistics:
    return Statistics(x.square().mean(0), len(x), x.T @ x / len(x) if full else None)


@pytest.mark.parametrize("full", [False, True])
def test_scaled_statistics_are_those_of_the_scaled_inputs(full):
    x, scale = torch.randn(50, 24) @ torch.randn(24, 24), random_scale(24)
    found, expected = scaled(statistics_of(x, full), scale), statistics_of(x / scale, full)
    assert found.tokens == 50
    torch.testing.assert_close(found.second_moment, expected.second_moment)
    torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"shape \[24\], got \[23\]"):
        scaled(found, scale[1:])
    with pytest.raises(ValueError, match="got -1"):
        scaled(found, -torch.ones(24))


def outliers(rows: int, k: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs of which every 29th channel is `factor` times larger and its columns smaller."""
    large = torch.where(torch.arange(k) % 29 == 3, factor, 1.0)
    return torch.randn(rows, k) / large, torch.randn(400, k) * large


def output_error(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, config: AAACConfig) -> float:
    """The mean squared error of the layer's outputs, from quantised values and the inputs themselves."""
    encoding = encode(weight * scale, config, statistics_of(x / scale, config.rounding == "gptq"))
    group = torch.arange(weight.shape[1]) // config.group_size
    entries = encoding.codebooks[encoding.selector.long()[:, group], encoding.codes.long()]
    return float((x @ (entries * encoding.scale[:, group] / scale - weight).T).square().mean())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_outliers_are_saved(kind, rounding):
    weight, x = outliers(64, 256, 30.0)
    config = AAACConfig(*kind, rounding=rounding, step="prepare")
    scale = search_scale([weight], statistics_of(x), config)
    assert (scale.dtype, scale.shape) == (torch.float32, (256,))
    without = output_error(weight, x, torch.ones(256), config)
    assert output_error(weight, x, scale, config) < 0.8 * without


@pytest.mark.parametrize("codebooks", ["learned", "if4"])
def test_never_worse_than_no_scale(kind, codebooks):
    weights = [torch.randn(n, 192) * random_scale(192) for n in (48, 16)]
    statistics = Statistics(random_scale(192) ** 2, 100)
    config = AAACConfig(*kind, codebooks=codebooks, rounding="nearest")
    scale = search_scale(weights, statistics, config)
    if scale is not None:
        ones = torch.ones(192)
        after, before = (
            sum(float(encode(w * a, config, scaled(statistics, a)).error) for w in weights) for a in (scale, ones)
        )
        assert after < before


def rtn_error(weight: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, group_size: int) -> float:
    """Plain round-to-nearest to -7..7 of a scaled weight, weighted by the second moments; fp64."""
    groups = (weight * scale).double().unflatten(1, (-1, group_size))
    step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().double()
    error = ((groups / step).round().clamp(-7, 7) * step).flatten(1) / scale - weight
    return float((error.square() * moment).sum())


def test_the_best_ratio_of_the_paper_is_found():
    weight, x = outliers(40, 192, 6.0)
    x = x * random_scale(192)
    moment = x.square().mean(0)
    found = search_scale([weight], statistics_of(x), AAACConfig("int4", 64, "int4", scale_search=False))
    scales = []
    for step in range(20):
        power = moment.sqrt() ** (step / 20)
        scales.append(power / (power.max() * power.min()).sqrt())
    errors = [rtn_error(weight, scale, moment, 64) for scale in scales]
    assert min(errors) < 0.8 * errors[0]
    assert rtn_error(weight, found, moment, 64) <= 1.02 * min(errors)
    # and it is one of them
    assert min(float((found / scale).log().abs().max()) for scale in scales) < 1e-4


def test_search_is_repeatable_and_ignores_dead_channels_and_the_hessian():
    weight, x = outliers(64, 256, 30.0)
    x[:, 5] = 0
    state = torch.get_rng_state()
    first, second = (
        search_scale([weight], statistics_of(x, full), AAACConfig(group_size=64)) for full in (True, False)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[5] == 1
    alive = torch.cat([first[:5], first[6:]])
    assert float(alive.max() * alive.min()) == pytest.approx(1, rel=1e-4)


def test_large_weights_are_sampled(monkeypatch):
    monkeypatch.setattr("aaac_ao.awq.SAMPLE_WEIGHTS", 1 << 12)
    weight, x = outliers(256, 128, 30.0)
    seen = []
    monkeypatch.setattr("aaac_ao.awq.encode", lambda w, *rest: seen.append(len(w)) or encode(w, *rest))
    config = AAACConfig(group_size=64, rounding="nearest", iterations=2)
    scale = search_scale([weight.bfloat16(), weight[:16]], statistics_of(x), config)
    assert set(seen) == {32, 16}
    assert output_error(weight, x, scale, config) < 0.8 * output_error(weight, x, torch.ones(128), config)


@pytest.mark.parametrize("moment", [torch.ones(64), torch.zeros(64)])
def test_no_scale_where_channels_are_alike(moment):
    assert search_scale([torch.randn(16, 64)], Statistics(moment, 10), AAACConfig(group_size=64)) is None


def test_bad_inputs():
    statistics, config = Statistics(torch.rand(64), 10), AAACConfig(group_size=64)
    with pytest.raises(ValueError, match="weights is empty"):
        search_scale([], statistics, config)
    with pytest.raises(ValueError, match=r"in_features \[64, 128\], statistics of 64"):
        search_scale([torch.randn(4, 64), torch.randn(4, 128)], statistics, config)
    with pytest.raises(ValueError, match="NaN"):
        search_scale([torch.full((4, 64), torch.nan)], statistics, config)
    with pytest.raises(ValueError, match=r"in_features \[128\], statistics of 64"):
        search_scale([torch.randn(4, 128)], statistics, config)
    with pytest.raises(ValueError, match="smaller than group_size"):
        search_scale([torch.randn(4, 32)], Statistics(torch.rand(32), 10), config)
    with pytest.raises(ValueError, match="no token"):
        search_scale([torch.randn(4, 64)], Statistics(torch.rand(64), 0), config)
    with pytest.raises(ValueError, match="second_moment"):
        search_scale([torch.randn(4, 64)], Statistics(torch.rand(64) - 2, 10), config)
    with pytest.raises(TypeError, match="floating-point"):
        search_scale([torch.ones(4, 64, dtype=torch.int32)], statistics, config)
