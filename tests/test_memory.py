"""How much memory calibration takes, counted by torch's allocator, and what takes little of it is still right."""

import weakref
from collections.abc import Callable

import pytest
import torch
from encode_oracle import upper_root
from torch import nn
from torch.profiler import ProfilerActivity, profile

from aaac_ao import AAACConfig, Statistics, block_pass, calibrate_checkpoint, heap
from aaac_ao.blocks import residual_bases
from aaac_ao.checkpoint import ModelOnDisk, SourceCheckpoint
from aaac_ao.encode import encode, second_order
from aaac_ao.encode.factor import damping, upper_factor
from aaac_ao.encode.kmeans import lloyd
from aaac_ao.first_pass import first_pass
from aaac_ao.hidden import StateCache
from aaac_ao.moments import InputSums
from aaac_ao.shifts import OutputShifts

MB = 1 << 20


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes of tensors at a time that a call allocates on the CPU."""
    run()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def inputs(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k) @ (torch.eye(k) + torch.randn(k, k) / k**0.5)


def test_the_factor_is_that_of_the_damped_hessian():
    hessian, order = torch.zeros(300, 300), torch.randperm(300)
    hessian.addmm_((x := inputs(600, 300)).t(), x)
    panels = upper_factor(hessian, order, [100, 37, 163], share=0.02)
    assert [list(panel.shape) for panel in panels] == [[100, 300], [37, 200], [163, 163]]
    upper = torch.cat([nn.functional.pad(panel, (300 - panel.shape[1], 0)) for panel in panels]).double()
    damped = hessian.double() + torch.eye(300) * 0.02 * hessian.double().diagonal().mean()
    expected = upper_root(damped[order][:, order])
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("tokens", [3, 60])
def test_what_fp32_cannot_factorise_is_damped_or_done_in_fp64(tokens):
    x = inputs(tokens, 96) * 1e3
    hessian, order = x.T @ x, torch.arange(96)
    panels = upper_factor(hessian, order, [64, 32], share=1e-9)
    assert all(bool(torch.isfinite(panel).all()) for panel in panels)
    assert float(damping(torch.zeros(4, 4), 0.01)) == 1
    with pytest.raises(ValueError, match="96 inputs cannot be factorised"):
        upper_factor(torch.eye(96) - torch.full((96, 96), 9.0), order, [96])


@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_second_order_rounding_takes_half_a_matrix_besides_its_hessian(rounding):
    k = 2048
    x = inputs(2 * k, k)
    hessian, weight = x.T @ x / len(x), torch.randn(64, k)
    before = hessian.clone()
    config, matrix = AAACConfig("nvfp4", rounding=rounding), 4 * k * k
    peak = peak_of(lambda: encode(weight, config, Statistics(before.diagonal().clone(), len(x), hessian)))
    assert peak < 0.6 * matrix + 12 * MB  # the factor; chunks and tables do not grow with K
    assert torch.equal(hessian, before)


def test_sums_make_small_copies():
    x = torch.randn(8192, 512).bfloat16()
    sums = InputSums.zeros(512, "cpu", full=True)
    assert peak_of(lambda: sums.add(x)) < 6 * MB
    assert torch.allclose(sums.hessian, 2 * x.float().T @ x.float(), rtol=1e-3, atol=1)
    assert torch.allclose(sums.squares, sums.hessian.diagonal(), rtol=1e-4)


def test_the_first_pass_holds_no_activations(tiny_llama):
    model, seen = tiny_llama().eval(), []
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    for module in layers.values():
        module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        kept = first_pass(model, [torch.randint(0, 97, (2, 9))], layers, StateCache())
    assert len(seen) == len(layers)
    assert all(reference() is None for reference in seen)
    assert [stage[0].split(".")[-1] for stage in kept[1].stages[:4]] == ["q_proj", "o_proj", "gate_proj", "down_proj"]


def test_residual_streams_are_found_without_keeping_activations():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64)
            self.rest = nn.ModuleList(nn.ReLU() for _ in range(6))

        def forward(self, x):
            wide = self.act(self.up(x))
            for module in self.rest:
                wide = module(wide)
            return x + self.down(wide)

    block, x = Block(), torch.randn(4, 512, 64)
    found = {}
    with torch.no_grad():
        plain = peak_of(lambda: block(x))
        peak = peak_of(lambda: found.update(residual_bases(block, lambda: block(x), {"down": block.down})))
    assert found == {"down": block.up}  # the latest module that sees the stream
    assert peak < plain + 2048 * 1024 * 4 * 1.5  # samples of eight inputs, 256 tokens each


def test_products_after_mkl_gave_its_buffers_back():
    a, b = torch.randn(300, 700), torch.randn(700, 500)
    before = a @ b
    heap._free_mkl_buffers()()
    assert torch.equal(a @ b, before)


@pytest.mark.parametrize("outputs", [8, 40])
@pytest.mark.parametrize("with_base", [False, True])
def test_output_shifts_are_those_of_their_definition(outputs, with_base):
    """Fewer outputs than inputs are summed directly; more of them through the shift of the inputs."""
    layers = {name: nn.Linear(24, outputs, bias=False) for name in ("a", "b")}
    site = nn.Identity()
    shifts = OutputShifts(layers, {"b": site} if with_base else {})
    expected, tokens = {name: torch.zeros(outputs, 24, dtype=torch.float64) for name in layers}, 0
    for _ in range(3):
        x, x0 = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
        base, base0 = torch.randn(2, 5, outputs), torch.randn(2, 5, outputs)
        shifts.add({layers["a"]: [x0], site: [base0]}, {layers["a"]: [x], site: [base]})
        tokens += 10
        for name, layer in layers.items():
            moved = (x0 - x).double() @ layer.weight.double().T
            moved = moved + (base0 - base if with_base and name == "b" else 0)
            expected[name] += moved.flatten(0, 1).T @ x.flatten(0, 1).double()
    for name in layers:
        assert torch.allclose(shifts.take(name, tokens).double(), expected[name] / tokens, atol=1e-5)


def test_the_factor_is_gone_before_the_last_weight_is_worked_on_under_h(monkeypatch):
    panels, alive = [], []

    def factor(*args):
        made = upper_factor(*args)
        panels.extend(weakref.ref(panel) for panel in made)
        return made

    def descend(*args):
        alive.append(sum(panel() is not None for panel in panels))
        return original(*args)

    original = second_order.descend
    monkeypatch.setattr(second_order, "upper_factor", factor)
    monkeypatch.setattr(second_order, "descend", descend)
    x, weight = inputs(600, 300), torch.randn(40, 300)
    statistics = Statistics((x * x).mean(0), 600, x.T @ x / 600)
    config = AAACConfig("nvfp4", rounding="gptq-thorough")
    kept = encode(weight, config, statistics)
    assert min(alive) > 0
    alive.clear()
    last = encode(weight, config, statistics, None, None, True)
    assert alive
    assert max(alive) == 0
    assert torch.equal(kept.codes, last.codes)
    assert torch.equal(kept.scale, last.scale)


def test_k_means_makes_small_copies():
    u, importance = torch.randn(512, 64, 16), torch.rand(64, 16)
    scale, books = u.abs().amax(-1), torch.linspace(-1, 1, 32).view(2, 16)
    u = u / scale[..., None]
    assert peak_of(lambda: lloyd(u, scale, importance, books, 2)) < 4 * u.nbytes + MB


def test_on_disk_the_last_stage_is_encoded_without_the_original_block(tiny_llama, tmp_path, monkeypatch):
    tiny_llama(layers=3).bfloat16().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    originals, alive, encode_, load = {}, [], block_pass.encode, ModelOnDisk.load
    reads, read = [], SourceCheckpoint.read

    def loading(disk, names, copy=False):
        with monkeypatch.context() as patch:
            patch.setattr(disk.source, "read", lambda names: reads.append(len(list(names))) or read(disk.source, names))
            load(disk, names, copy)
        assert not copy or set(reads) == {1}  # a tensor at a time is there twice, mapped and copied
        reads.clear()
        if copy:  # a block
            weights = {n: p for n, p in disk.model.named_parameters() if not p.is_meta and n.endswith("proj.weight")}
            assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights.values())
            originals.clear()
            originals.update({name.split(".")[-2]: weakref.ref(weight) for name, weight in weights.items()})

    def encoding(*args):
        alive.append({name for name, weight in originals.items() if weight() is not None})
        return encode_(*args)

    monkeypatch.setattr(ModelOnDisk, "load", loading)
    monkeypatch.setattr(block_pass, "encode", encoding)
    data = [torch.randint(0, 97, (2, 40)) for _ in range(2)]
    config = AAACConfig("nvfp4", rounding="gptq")
    calibrate_checkpoint(tmp_path / "source", config, data, tmp_path / "out", progress=False)
    assert len(alive) == 21
    assert alive[6::7] == [{"down_proj"}] * 3
