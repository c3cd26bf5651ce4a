"""`calibrate_`: the same result as observing the whole model, block by block, all or nothing."""

import copy
import functools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor, block_pass, calibrate_
from aaac_ao.blocks import find_blocks
from aaac_ao.moments import InputSums
from aaac_ao.observer import ObserverTensor

CONFIG = AAACConfig(group_size=64)
original_ = functools.partial(calibrate_, propagate="original", progress=False)


def ids(batches: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 97, (2, 11 + i)) for i in range(batches)]


def quantised(model: nn.Module) -> dict[str, AAACTensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), AAACTensor)}


def observed_at_once(model: nn.Module, batches) -> nn.Module:
    model = copy.deepcopy(model)
    inside = lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"  # noqa: E731
    quantize_(model, AAACConfig(group_size=64, step="prepare"), inside)
    for batch in batches:
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
    quantize_(model, AAACConfig(group_size=64, step="convert"), inside)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = quantised(a), quantised(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_equals_observing_the_whole_model(tiny_llama):
    model, batches = tiny_llama(), ids()
    expected = observed_at_once(model, batches)
    assert original_(model, CONFIG, batches) is model
    assert same_weights(model, expected)
    assert len(quantised(model)) == 14
    assert "lm_head" not in quantised(model)


@pytest.mark.parametrize("step", ["prepare", "convert", "prepare_for_loading"])
def test_the_step_of_the_config_is_ignored(tiny_llama, step):
    model, batches = tiny_llama(), ids()
    expected = observed_at_once(model, batches)
    original_(model, AAACConfig(group_size=64, step=step), batches)
    assert same_weights(model, expected)


def test_dicts_with_padding_masks(tiny_llama):
    model = tiny_llama()
    batches = [{"input_ids": b, "attention_mask": (torch.arange(b.shape[1]) < 7).expand(b.shape).long()} for b in ids()]
    expected = observed_at_once(model, batches)
    original_(model, CONFIG, batches)
    assert same_weights(model, expected)


@pytest.mark.parametrize("propagate", ["original", "quantized"])
def test_no_more_than_one_block_is_observed_at_a_time(tiny_llama, monkeypatch, propagate):
    model, alive, most = tiny_llama(layers=3), [], []
    original = InputSums.add

    def add(self, x, weights=None):
        alive[:] = [ref for ref in alive if ref() is not None]
        if not any(ref() is self.hessian for ref in alive):
            alive.append(weakref.ref(self.hessian))
        most.append(len(alive))
        original(self, x, weights)

    monkeypatch.setattr(InputSums, "add", add)
    calibrate_(model, CONFIG, ids(), progress=False, propagate=propagate)
    assert max(most) == (4 if propagate == "original" else 1)


def test_layers_outside_the_blocks_are_included_when_asked_for(tiny_llama):
    model, batches = tiny_llama(), ids()
    reference = copy.deepcopy(model)
    config = AAACConfig(group_size=64, rounding="nearest")
    original_(model, config, batches, lambda module, name: True)
    assert "lm_head" in quantised(model)
    seen = []
    reference.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    from aaac_ao.encode import Statistics

    moment = torch.cat(seen).square().mean(0)
    expected = AAACTensor.from_hp(reference.lm_head.weight, config, Statistics(moment, 1))
    close = (model.lm_head.weight.dequantize() - expected.dequantize()).norm() / expected.dequantize().norm()
    assert close < 1e-3


def test_any_model_without_blocks():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 128))
    calibrate_(model, CONFIG, [torch.randn(5, 64)], progress=False)
    assert len(quantised(model)) == 2


class Alternating(nn.Module):
    """Blocks that take different arguments, as models with alternating attention masks do."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, hidden_states, shift=0.0):
            return (hidden_states + self.linear(hidden_states + shift),)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, 64)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, batch):
        hidden = self.embed(batch)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden_states=hidden, shift=float(index))[0]
        return SimpleNamespace(logits=hidden)


def test_every_block_gets_its_own_arguments():
    model, batches = Alternating(), ids()
    assert find_blocks(model) == list(model.blocks)
    expected = observed_at_once(model, batches)
    original_(model, CONFIG, batches)
    assert same_weights(model, expected)


class Looped(Alternating):
    def forward(self, batch):
        hidden = self.embed(batch)
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden)[0]
        return hidden


class NormBetween(Alternating):
    def forward(self, batch):
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = torch.nn.functional.layer_norm(block(hidden)[0], (64,))
        return hidden


class Skipping(Alternating):
    def forward(self, batch):
        hidden = self.embed(batch)
        for index, block in enumerate(self.blocks):
            if index != batch.shape[1] % 3:
                hidden = block(hidden)[0]
        return hidden


class Reversed(Alternating):
    def forward(self, batch):
        hidden = self.embed(batch)
        for block in reversed(self.blocks):
            hidden = block(hidden)[0]
        return hidden


class InPlace(Alternating):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, hidden_states):
            hidden_states += self.linear(hidden_states)
            return hidden_states

    def forward(self, batch):
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Returning(Alternating):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return {"x": self.linear(x)}

    def forward(self, batch):
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = block(x=hidden)["x"]
        return hidden


@pytest.mark.parametrize("kind", [Looped, NormBetween, Skipping, Reversed, InPlace, Returning])
def test_blocks_that_are_no_chain_are_observed_as_a_whole(kind, caplog):
    model, batches = kind(), ids()
    expected = observed_at_once(model, batches)
    with caplog.at_level("INFO", logger="aaac_ao"):
        original_(model, CONFIG, batches)
    assert same_weights(model, expected)
    assert "observing the model as a whole, because" in caplog.text


def test_batches_that_ask_for_a_cache(tiny_llama):
    model = tiny_llama()
    batches = [{"input_ids": b, "use_cache": True, "attention_mask": torch.ones_like(b)} for b in ids()]
    expected = observed_at_once(model, ids_of(batches))
    original_(model, CONFIG, batches)
    assert same_weights(model, expected)


def ids_of(batches) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in batches]


def test_modes_and_cache_setting_survive(tiny_llama):
    model = tiny_llama().train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    calibrate_(model, CONFIG, ids(), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache


def test_weights_of_other_torchao_configs_are_left_alone(tiny_llama):
    from torchao.quantization import Int8WeightOnlyConfig

    model = tiny_llama()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("o_proj"))
    calibrate_(model, CONFIG, ids(), progress=False)
    assert len(quantised(model)) == 12


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "empty"),
        (torch.zeros(1, 4, dtype=torch.long), TypeError, "wrap it in a list"),
        ({"input_ids": 1}, TypeError, "wrap it in a list"),
        (["text"], TypeError, "batch 0 .* got str"),
        ([torch.zeros(1, 4, dtype=torch.long), 3], TypeError, "batch 1 .* got int"),
        ([torch.zeros(0, 4, dtype=torch.long)], ValueError, "batch 0 is empty"),
        ([{}], ValueError, "batch 0 is an empty mapping"),
    ],
)
def test_bad_batches(tiny_llama, batches, error, match):
    model = tiny_llama()
    with pytest.raises(error, match=match):
        calibrate_(model, CONFIG, batches, progress=False)
    assert not quantised(model)


def test_unreached_layers_are_left_alone_or_refused(tiny_llama, caplog):
    model = tiny_llama()
    model.model.layers[1].extra = nn.Linear(128, 128)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.extra: no calibration batch reaches it"):
        calibrate_(model, CONFIG, ids(), progress=False, strict=True)
    assert not quantised(model)
    calibrate_(model, CONFIG, ids(), progress=False)
    assert "no calibration batch reaches model.layers.1.extra: left in high precision" in caplog.text
    assert len(quantised(model)) == 14
    with pytest.raises(ValueError, match="no calibration batch reaches it"):
        calibrate_(model, CONFIG, ids(), progress=False)  # nothing else is left


def test_few_tokens_are_a_warning_with_numbers(tiny_llama, caplog):
    calibrate_(tiny_llama(), CONFIG, [torch.randint(0, 97, (2, 65))], progress=False)
    assert "2 layer(s) see fewer calibration tokens than they have inputs" in caplog.text
    assert "mlp.down_proj the fewest: 130 tokens for 172 inputs" in caplog.text


def test_bad_weights_are_refused_before_any_work(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*NaN"):
        calibrate_(model, CONFIG, ids(), progress=False)
    assert not quantised(model)


def test_broken_activations_are_refused(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: calibration batch 0 gives it NaN"):
        calibrate_(model, CONFIG, ids(), progress=False)
    assert not quantised(model)


def test_an_interrupted_run_leaves_a_running_model_and_goes_on(tiny_llama, monkeypatch):
    model, batches = tiny_llama(), ids()
    expected = observed_at_once(model, batches)
    original, calls = block_pass.encode, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(block_pass, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        original_(model, CONFIG, batches)
    assert not any(isinstance(getattr(m, "weight", None), ObserverTensor) for m in model.modules())
    model(batches[0])
    assert len(quantised(model)) == 7
    monkeypatch.setattr(block_pass, "encode", original)
    original_(model, CONFIG, batches)
    assert quantised(model).keys() == quantised(expected).keys()


def test_nothing_to_do_is_a_warning(tiny_llama, caplog):
    model = tiny_llama()
    calibrate_(model, CONFIG, ids(), progress=False)
    calibrate_(model, CONFIG, ids(), progress=False)
    assert "quantised already" in caplog.text
    with pytest.raises(ValueError, match=r"no nn\.Linear is selected"):
        calibrate_(model, CONFIG, ids(), lambda module, name: False, progress=False)
