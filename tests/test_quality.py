"""The quality benchmark: its data, its table, and one run through a child process, on small random models."""

import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from aaac_ao import AAACConfig, Statistics
from aaac_ao.encode import encode, rounding, second_order
from aaac_ao.evaluate import evaluate, windows_of
from benchmarks import methods, peer_job, peers, quality, quality_report, subjects


@pytest.fixture
def subject(tiny_llama, tmp_path):
    """A saved random model with random data."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    held_out = torch.randint(0, 97, (3, 24))
    cut = lambda count, seed: torch.randint(0, 97, (count, 24), generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return subjects.Subject("tiny", tmp_path / "model", model, held_out, cut, "random tokens")


def test_methods_are_valid_and_chosen_by_key():
    every = [*methods.our_methods(methods.SETTINGS), *peers.PEERS]
    assert len({(m.name, m.setting) for m in every}) == len(every)
    for method in every:
        assert (Path(quality.__file__).parent / method.script).is_file()
        if method.ours:
            assert AAACConfig(**method.options["config"]).group_size == int(method.setting.split("-g")[1])
    with_ablation = [*every, *methods.ablation_methods(methods.SETTINGS)]
    assert methods.choose(with_ablation, ["all"]) == every
    assert all(m.ablation for m in methods.choose(with_ablation, ["ablation"]))
    assert methods.choose(every, ["peers", "ours"]) == every
    assert {m.name for m in methods.choose(every, ["AAAC-*-awq"])} == {"AAAC nearest + awq", "AAAC gptq + awq"}
    with pytest.raises(ValueError, match=r"no method matches 'nope'.*auto-round"):
        methods.choose(every, ["nope"])
    chosen = methods.with_baselines(methods.choose(every, ["hqq"]))
    assert [(m.name, m.setting) for m in chosen] == [("RTN", "int4-g32"), ("hqq", "int4-g64")]
    chosen = methods.with_baselines(methods.choose(methods.our_methods(["nvfp4-g16"]), ["rtn", "if4"]))
    assert [(m.name, m.setting) for m in chosen] == [("RTN", s) for s in ("nvfp4-g16", "int4-g32")] + [
        ("IF4", "nvfp4-g16")
    ]


def test_random_windows():
    ids = torch.arange(100, 150)
    windows = subjects.random_windows(ids, 200, 7, seed=3)
    assert windows.shape == (200, 7)
    assert torch.equal(windows - windows[:, :1], torch.arange(7).expand(200, 7))
    assert set(windows[:, 0].tolist()) == set(range(100, 144))
    assert torch.equal(windows, subjects.random_windows(ids, 200, 7, seed=3))
    assert not torch.equal(windows, subjects.random_windows(ids, 200, 7, seed=4))
    with pytest.raises(ValueError, match="50 calibration tokens are fewer than one window of 51"):
        subjects.random_windows(ids, 1, 51, seed=0)


def test_text_written_by_a_model(tiny_llama):
    model = tiny_llama()
    assert not torch.equal(subjects.written_by(model, 3, 12, seed=0), subjects.written_by(model, 3, 12, seed=1))
    with torch.no_grad():
        model.lm_head.weight *= 1e5  # the likeliest token is all but certain
    windows = subjects.written_by(model, 3, 12, seed=0, batch_size=2)
    assert windows.shape == (3, 12)
    assert (windows[:, 0] == 0).all()
    with torch.no_grad():
        likeliest = model(windows).logits.argmax(-1)
    assert torch.equal(likeliest[:, 1:-1], windows[:, 2:])  # the start token's embedding is zero: no word is likeliest


def test_a_model_directory_with_texts(tiny_llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_llama().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0").save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 97, (300,))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    found = subjects.load(str(tmp_path / "model"), 2, tmp_path / "text.txt", tmp_path / "text.txt")
    assert torch.equal(found.held_out, windows_of(ids, 64, 2))  # the model has 64 positions
    assert found.calibration(5, 0).shape == (5, 64)
    assert "300 tokens" in found.data
    assert subjects.load(str(tmp_path / "model"), 2, tmp_path / "text.txt").calibration(2, 0).shape == (2, 64)
    with pytest.raises(ValueError, match="--text"):
        subjects.load(str(tmp_path / "model"), 2)


def test_replayed_logits_are_the_models(tiny_llama, monkeypatch):
    model, windows = tiny_llama(), torch.randint(0, 97, (4, 10))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    replayed = subjects.Replayed(model)
    expected = evaluate(model, windows, batch_size=2)
    calls.clear()
    assert [evaluate(replayed, windows, batch_size=2) for _ in range(3)] == [expected] * 3
    assert len(calls) == 2
    monkeypatch.setattr(subjects, "CACHED_BYTES", 0)
    evaluate(subjects.Replayed(model), windows, batch_size=2)
    assert len(calls) == 4


def test_evaluator_measures_the_replaced_weights(subject, tiny_llama):
    other = tiny_llama()
    evaluator = quality.Evaluator(subject)
    ids = subject.calibration(4, 0)
    weights = {name: value.data.clone() for name, value in other.named_parameters()}
    result, loss = evaluator(weights, ids)
    expected = evaluate(other, subject.held_out, subject.model)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert result.kl == pytest.approx(expected.kl, rel=1e-5)
    with torch.no_grad():
        assert loss == pytest.approx(float(other(ids[:2], labels=ids[:2]).loss), rel=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    partial, _ = evaluator({name: weights[name]}, ids)  # nothing of the run before is left
    with torch.no_grad():
        subject.model.get_parameter(name).copy_(weights[name])
    assert partial.perplexity == pytest.approx(evaluate(subject.model, subject.held_out).perplexity, rel=1e-6)


def run_script(monkeypatch, tmp_path, subject, quantise, outcome) -> dict:
    from safetensors.torch import save_file

    save_file({"ids": subject.calibration(2, 0)}, tmp_path / "ids")
    paths = {key: str(tmp_path / key) for key in ("weights", "result")}
    job = {"model": str(subject.directory), "options": {"x": 1}, "seed": 0, "calibration": str(tmp_path / "ids")}
    (tmp_path / "job.json").write_text(json.dumps(job | paths))
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "job.json")])
    peer_job.main(("tqdm",), quantise, outcome)
    return json.loads((tmp_path / "result").read_text())


def test_a_job_counts_bytes_and_layers(subject, tmp_path, monkeypatch):
    name = "model.layers.1.mlp.gate_proj"

    def quantise(model: nn.Module, job: peer_job.Job) -> torch.Tensor:
        assert job.options == {"x": 1}
        ballast = torch.ones(96 << 20, dtype=torch.uint8)  # freed before the end: only the high-water mark knows
        model.get_submodule(name).weight.data.mul_(2)
        return ballast[:0].clone()

    def outcome(model: nn.Module, job: peer_job.Job, state: torch.Tensor) -> peer_job.Outcome:
        weight = model.get_submodule(name).weight
        return peer_job.Outcome({f"{name}.weight": weight}, {name: weight.numel() / 2 + 100}, ["a note"])

    result = run_script(monkeypatch, tmp_path, subject, quantise, outcome)
    layers = [m for n, m in subject.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    own = subject.model.get_submodule(name).weight.numel()
    total = sum(layer.weight.numel() for layer in layers)
    assert result["bits"] == pytest.approx((16 * (total - own) + 4 * own + 800) / total)
    assert result["notes"] == ["a note", "13 of 14 layers left in 16 bits"]
    assert set(result["versions"]) == {"torch", "tqdm"}
    assert result["peak_mb"] > 80
    with torch.no_grad():
        subject.model.get_submodule(name).weight *= 2
    assert result["check_loss"] == pytest.approx(peer_job.loss_of(subject.model, subject.calibration(2, 0)), rel=1e-5)


def test_a_failing_job_says_why(subject, tmp_path, monkeypatch):
    def fail(model: nn.Module, job: peer_job.Job) -> None:
        raise RuntimeError("no kernel\nand a long story")

    result = run_script(monkeypatch, tmp_path, subject, fail, lambda *_: peer_job.Outcome())
    assert result == {"error": "RuntimeError: no kernel"}
    result = run_script(monkeypatch, tmp_path, subject, lambda *_: None, lambda *_: peer_job.Outcome())
    assert "left every layer as it was" in result["error"]


def test_our_script_hands_back_what_it_made(subject, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(quality.__file__).parent))
    ours = importlib.import_module("ours")
    config = {"format": "nvfp4", "codebooks": "fp4", "scale_search": False}
    job = peer_job.Job("", subject.calibration(2, 0), {"config": config, "calibrate": None}, 0)
    model = subject.model
    before = {name: value.data.clone() for name, value in model.named_parameters()}
    ours.quantise(model, job)
    found = ours.outcome(model, job, None)
    assert len(found.stored_bytes) == 14
    changed = {name for name, weight in found.weights.items() if not torch.equal(weight, before[name])}
    assert changed == {f"{name}.weight" for name in found.stored_bytes}
    down = "model.layers.0.mlp.down_proj"
    rows, columns = before[f"{down}.weight"].shape
    groups = math.ceil(columns / 16)
    assert found.stored_bytes[down] >= rows * (columns / 2 + groups) + 64 + 4


def test_steps_that_are_left_out_are_missed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(quality.__file__).parent))
    ours = importlib.import_module("ours")
    used = {name: getattr(second_order, name) for name in ("FEEDBACK_SCALES", "descend", "fit_scales", "anneal")}
    for module, name, value in (
        *((second_order, name, value) for name, value in used.items()),
        (rounding, "SWEEPS", rounding.SWEEPS),
        (second_order.SecondOrder, "_with_fitted_books", second_order.SecondOrder._with_fitted_books),
    ):
        monkeypatch.setattr(module, name, value)  # puts it back at the end
    inputs = [torch.randn(600, 192) @ (torch.eye(192) + torch.randn(192, 192) / 192**0.5) for _ in range(6)]
    weights, errors = torch.randn(6, 128, 192), []  # fits gain half a percent, more or less from layer to layer
    for step in (None, "annealing", "fit", "descent", "sweeps", "choice"):
        if step is not None:
            ours.STEPS[step]()
        layers = [
            (w, Statistics(x.square().mean(0), len(x), x.T @ x / len(x))) for w, x in zip(weights, inputs, strict=True)
        ]
        config = AAACConfig(group_size=64, rounding="gptq-thorough")
        errors.append(sum(float(encode(w, config, s).error) for w, s in layers))
    assert len(ours.STEPS) == 5
    assert all(more > 1.002 * fewer for fewer, more in zip(errors, errors[1:], strict=False))


def test_a_run_in_child_processes(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "nowhere")
    hqq = next(method for method in peers.PEERS if method.name == "hqq")
    rtn = next(method for method in methods.our_methods(["int4-g32"]) if method.name == "RTN")
    arguments = quality.parse(["--calibration-windows", "2", "--threads", "1", "--seeds", "2"])
    rows = list(quality.run_subject(subject, [rtn, hqq], arguments))
    assert [row["method"] for row in rows] == ["original", "RTN", "hqq"]  # no data, no seeds
    assert rows[1]["kl"] > 0
    assert rows[1]["bits"] > 4.5
    assert rows[1]["notes"] == []  # its own forward pass agrees with its dequantised weights
    assert "no environment .venv-peers/light" in rows[2]["error"]
    text = quality_report.table(rows)
    assert "- hqq int4-g64: not available: no environment" in text


ROWS = [
    {"model": "m", "method": "original", "perplexity": 10.0},
    *(
        {"model": "m", "method": name, "setting": setting, "ours": ours, "kl": kl, "perplexity": perplexity}
        | {"bits": 4.5, "seconds": 2.0, "peak_mb": 7.0, "notes": [], "note": note, "versions": {"torch": "1"}}
        for name, setting, ours, kl, perplexity, note in (
            ("RTN", "int4-g32", True, 0.4, 12.0, ""),
            ("RTN", "nvfp4-g16", True, 0.2, 11.0, ""),
            ("AAAC", "nvfp4-g16", True, 0.05, 10.5, ""),
            ("AAAC", "nvfp4-g16", True, 0.15, 10.7, ""),
            ("peer", "int4-g64", False, 0.1, 11.0, "slow"),
        )
    ),
    {"model": "m", "method": "gone", "setting": "int4-g64", "ours": False, "error": "no such thing", "note": ""},
]


def test_table_averages_seeds_and_compares_with_both_baselines():
    rows = {row["method"]: row for row in quality_report.with_gaps(quality_report.averaged(ROWS))}
    assert rows["AAAC"]["kl"] == pytest.approx(0.1)
    assert rows["AAAC"]["kl_sd"] == pytest.approx(statistics.stdev([0.05, 0.15]))
    assert rows["AAAC"]["kl_gap"] == pytest.approx(0.5)
    assert rows["AAAC"]["kl_gap_common"] == pytest.approx(0.75)
    assert rows["AAAC"]["ppl_gap"] == pytest.approx(0.4)
    assert rows["AAAC"]["ppl_gap_common"] == pytest.approx(0.7)
    assert rows["peer"]["kl_gap_common"] == pytest.approx(0.75)
    assert "kl_gap" not in rows["peer"]
    text = quality_report.table(ROWS)
    assert "0.10000 ± 0.07071" in text
    assert "- gone int4-g64: not available: no such thing" in text
    assert "- peer: slow" in text
    assert "Versions: torch 1." in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    quality_report.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_errors(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--methods", "nope"])
    assert "no method matches 'nope'" in str(stopped.value)
    for arguments in (["--windows", "0"], ["--settings", "int3"]):
        with pytest.raises(SystemExit):
            quality.parse(arguments)
    assert "must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(quality_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--plot", "plot.png"])
    assert "aaac-ao[bench]" in str(stopped.value)
