"""Checkpoints: torch.save, safetensors through torchao, and the documented bytes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensor_oracle import BOTH, sample
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor
from aaac_ao.packing import pack


@pytest.fixture(params=BOTH, ids=lambda kind: kind[0])
def kind(request):
    return request.param


def _config(kind, **fields) -> AAACConfig:
    return AAACConfig(format=kind[0], group_size=kind[1], iterations=2, **fields)


def _model(kind, quantised: bool = True) -> nn.Sequential:
    """A plain layer norm between two quantised layers, one of them in bf16 and with -0.0 scales."""
    model = nn.Sequential(nn.Linear(172, 100), nn.LayerNorm(100), nn.Linear(100, 37, bias=False, dtype=torch.bfloat16))
    if quantised:
        for layer in (model[0], model[2]):
            weight = sample(*layer.weight.shape, *kind).tensor(layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def assert_same(a: dict, b: dict) -> None:
    """Two state dicts hold the same bits, dtypes and kinds of tensors."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (isinstance(x, AAACTensor), x.dtype, x.shape) == (isinstance(y, AAACTensor), y.dtype, y.shape), name
        assert x.equal(y), name
        if isinstance(x, AAACTensor):
            for part in ("qdata", "scale", "codebooks", "per_tensor_scale", "act_pre_scale"):
                p, q = getattr(x, part), getattr(y, part)
                assert (p is None) == (q is None), (name, part)
                if p is not None:
                    assert (p.dtype, p.shape) == (q.dtype, q.shape), (name, part)
                    assert p.stride() == q.stride() or not p.is_contiguous(), (name, part)


# torch.save


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_save(tmp_path, kind, mmap):
    model = _model(kind)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
    assert_same(loaded, model.state_dict())
    for i in (0, 2):
        assert loaded[f"{i}.weight"].group_size == kind[1]


@pytest.mark.parametrize("fresh", ["prepare_for_loading", "meta", "quantised", "half"])
def test_load_state_dict(tmp_path, kind, fresh):
    """By copy into an uninitialised or other model, and by assignment onto the meta device."""
    model = _model(kind)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=fresh != "quantised")
    if fresh == "meta":
        with torch.device("meta"):
            other = _model(kind, quantised=False)
        other.load_state_dict(loaded, assign=True)
    else:
        other = _model(kind, quantised=fresh != "prepare_for_loading")
        if fresh == "prepare_for_loading":
            quantize_(other, _config(kind, step="prepare_for_loading"))
        if fresh == "half":
            other = other.half()
        other.load_state_dict(loaded)
    if fresh == "half":
        assert other[2].weight.dtype == torch.float16
        assert all(other[i].weight.equal(model[i].weight) for i in (0, 2))
        return
    assert_same(other.state_dict(), model.state_dict())
    x = torch.randn(3, 172)
    assert torch.equal(other[0](x), model[0](x))
    x = torch.randn(3, 100).bfloat16()
    assert torch.equal(other[2](x), model[2](x))


def test_load_state_dict_of_another_format(kind):
    model = _model(kind)
    other = _model(("nvfp4", 16) if kind[0] == "int4" else ("int4", 64))
    with pytest.raises(RuntimeError, match="cannot copy") as caught:
        model.load_state_dict(other.state_dict())
    assert len(str(caught.value)) < 1500


# safetensors


@pytest.mark.parametrize("act_pre_scale", [False, True])
def test_safetensors(tmp_path, kind, act_pre_scale):
    model = _model(kind)
    if act_pre_scale:
        weight = sample(100, 172, *kind).tensor(act_pre_scale=torch.rand(172))
        model[0].weight = nn.Parameter(weight, requires_grad=False)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    assert set(tensors) - {f"0._weight_{p}" for p in ("qdata", "scale", "act_pre_scale")} == {
        *(f"2._weight_{p}" for p in ("qdata", "scale")),
        *("0.bias", "1.weight", "1.bias"),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        read = file.metadata()
    result, leftover = unflatten_tensor_state_dict(load_file(tmp_path / "model.safetensors"), read)
    assert not leftover
    assert_same(result, state)


def test_sharded_safetensors(tmp_path, kind):
    """The parts of one weight in two files: what the first leaves over is completed by the second."""
    state = {name: tensor.detach() for name, tensor in _model(kind).state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    first = {k: v for k, v in tensors.items() if k in ("0._weight_qdata", "2._weight_scale", "1.bias", "0.bias")}
    shards = (first, {k: v for k, v in tensors.items() if k not in first})
    leftover, result = {}, {}
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{i}.safetensors", metadata=metadata)
        with safe_open(tmp_path / f"{i}.safetensors", framework="pt") as file:
            read = file.metadata()
        found, leftover = unflatten_tensor_state_dict({**leftover, **load_file(tmp_path / f"{i}.safetensors")}, read)
        result.update(found)
        assert set(leftover) == (set() if i else {"0._weight_qdata", "2._weight_scale"})
    assert_same(result, state)


def test_a_view_is_saved_as_itself(tmp_path, kind):
    weight = sample(100, 300, *kind).tensor()
    for view in (weight[32:], weight[:, 64:], weight.t()):
        tensors, metadata = flatten_tensor_state_dict({"a.weight": view})
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "view.safetensors", metadata=metadata)
        result, _ = unflatten_tensor_state_dict(load_file(tmp_path / "view.safetensors"), metadata)
        assert result["a.weight"].shape == view.shape
        assert result["a.weight"].equal(view)


def test_fresh_process(tmp_path, kind):
    """Importing the package is all that a reader needs."""
    model, config = _model(kind), _config(kind, codebooks="nf4")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    x = torch.randn(3, 172)
    torch.save([x, model[0](x)], tmp_path / "expected.pt")
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    script = f"""
import json, torch
import aaac_ao
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.core.config import config_from_dict
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
torch.set_num_threads({torch.get_num_threads()})
here = {str(tmp_path)!r}
config = config_from_dict(json.load(open(here + "/config.json")))
assert isinstance(config, aaac_ao.AAACConfig), config
print(config)
with safe_open(here + "/model.safetensors", framework="pt") as file:
    metadata = file.metadata()
state, leftover = unflatten_tensor_state_dict(load_file(here + "/model.safetensors"), metadata)
saved = torch.load(here + "/model.pt", weights_only=True, mmap=True)
assert not leftover and all(state[name].equal(saved[name]) for name in saved)
x, expected = torch.load(here + "/expected.pt", weights_only=True)
y = torch.nn.functional.linear(x, state["0.weight"], state["0.bias"])
assert torch.equal(y, expected), (y - expected).abs().max()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == repr(config)


@pytest.mark.parametrize("step", [None, "prepare", "convert", "prepare_for_loading"])
def test_config_round_trip(kind, step):
    config = _config(kind, step=step, codebooks="bof4-s", scale_search=False)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert type(again) is AAACConfig


# the documented bytes


def _place(n: int, k: int, row_bytes: int) -> tuple[int, int]:
    """Where code (n, k) is stored, by the formula of the format: offset of its byte, and shift within it.

    Tile (n // 16, k // 64) of 512 bytes; in it lane 4 g + t owns 16 bytes: four words (c, h) of 4 bytes; the word holds
    the 8 codes of row 8 h + g, columns 32 c + 8 t + 0..7, low nibble first.
    """
    h, g = n % 16 // 8, n % 8
    c, t, v = k % 64 // 32, k % 32 // 8, k % 8
    return n // 16 * row_bytes + k // 64 * 512 + (4 * g + t) * 16 + (2 * c + h) * 4 + v // 2, v % 2 * 4


def test_golden_codes(kind):
    """Every byte of a ragged weight is where the formula puts it, and what fills it up is zero."""
    s = sample(37, 172, *kind)
    qdata = s.tensor().qdata
    assert qdata.shape == (3, 3 * 512)
    expected = bytearray(3 * 3 * 512)
    for n in range(37):
        for k in range(172):
            offset, shift = _place(n, k, 3 * 512)
            expected[offset] |= int(s.codes[n, k]) << shift
    assert qdata.numpy().tobytes() == bytes(expected)


def _read(path) -> tuple[dict, dict[str, bytes]]:
    """Header and raw bytes of a safetensors file, read without any library."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, {name: body[start:stop] for name, (start, stop) in spans.items()}


def test_golden_int4_file(tmp_path):
    """A fixed weight on the INT4 grid: code 8 + w, scale 1 (bf16 3f80) or, for -0.0, 8000."""
    books = [[float(i - 8) for i in range(16)], [float(8 - i) / 2 for i in range(16)]]
    codes = (torch.arange(2)[:, None] * 3 + torch.arange(32)).remainder(16).to(torch.uint8)
    scale = torch.tensor([[1.0], [-0.0]], dtype=torch.bfloat16)
    weight = AAACTensor(pack(codes), scale, 32, 32, torch.bfloat16, books)
    tensors, metadata = flatten_tensor_state_dict({"layer.weight": weight})
    save_file(tensors, tmp_path / "golden.safetensors", metadata=metadata)
    header, parts = _read(tmp_path / "golden.safetensors")
    assert parts["layer._weight_scale"] == bytes.fromhex("803f 0080")
    # row 0 is lanes 0..3, row 1 lanes 4..7; of the four words of a lane the first lies inside 8 rows, 32 columns
    lanes = ["10325476", "98badcfe"] * 2 + ["436587a9", "cbed0f21"] * 2
    expected = bytearray(512)
    for lane, word in enumerate(lanes):
        expected[16 * lane : 16 * lane + 4] = bytes.fromhex(word)
    assert parts["layer._weight_qdata"] == bytes(expected)
    assert (header["layer._weight_qdata"]["dtype"], header["layer._weight_qdata"]["shape"]) == ("U8", [1, 512])
    assert (header["layer._weight_scale"]["dtype"], header["layer._weight_scale"]["shape"]) == ("BF16", [2, 1])
    about = json.loads(header["__metadata__"]["layer.weight"])
    assert about["_type"] == "AAACTensor"
    assert about["_tensor_data_names"] == ["qdata", "scale"]
    fields = about["_data"]
    assert (fields["group_size"], fields["k_pad"]) == (32, 32)
    assert fields["codebook_values"] == books
    assert fields["per_tensor_scale_value"] is None
    assert "bfloat16" in json.dumps(fields["dtype"])


def test_golden_nvfp4_file(tmp_path):
    """E4M3 scales: 1.0 is 38, -1.5 is bc, -0.0 is 80, 448 is 7e; the per-tensor scale is a number in the header."""
    scale = torch.tensor([[1.0, -1.5, -0.0, 448.0]]).to(torch.float8_e4m3fn)
    books = torch.arange(32).view(2, 16).bfloat16() / 16
    weight = AAACTensor(pack(torch.full((1, 64), 5, dtype=torch.uint8)), scale, 16, 0, torch.float32, books, 0.1)
    tensors, metadata = flatten_tensor_state_dict({"layer.weight": weight})
    save_file(tensors, tmp_path / "golden.safetensors", metadata=metadata)
    header, parts = _read(tmp_path / "golden.safetensors")
    assert parts["layer._weight_scale"] == bytes.fromhex("38bc807e")
    word = bytes.fromhex("55555555")
    assert parts["layer._weight_qdata"] == ((word + bytes(4)) * 2) * 4 + bytes(28 * 16)
    fields = json.loads(header["__metadata__"]["layer.weight"])["_data"]
    (pts,) = struct.unpack("<f", struct.pack("<f", 0.1))
    assert fields["per_tensor_scale_value"] == pts
    assert fields["codebook_values"] == [[i / 16 for i in range(16)], [i / 16 for i in range(16, 32)]]
    result, _ = unflatten_tensor_state_dict(tensors, metadata)
    w = result["layer.weight"].dequantize()
    expected = torch.tensor([5 / 16, -0.0, 0.0, 448 * 5 / 16]).mul(pts)
    expected[1], expected[2] = 1.5 * 21 / 16 * pts, 0.0
    torch.testing.assert_close(w[0, ::16], expected, rtol=1e-6, atol=0)
