"""The command line, as a user calls it."""

import itertools
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from aaac_ao import AAACTensor, cli
from aaac_ao.cli import app
from aaac_ao.integrations.transformers import load_model


@pytest.fixture
def model_directory(tiny_llama, tmp_path):
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "original")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(1, 97, (400,)).tolist()))
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("calibrated", [True, False])
def test_quantize_evaluate_generate(model_directory, text, tmp_path, calibrated):
    out = tmp_path / "quantised"
    data = ("--calibration", text, "--window", 32) if calibrated else ()
    output = succeed("quantize", model_directory, "--out", out, "--format", "nvfp4", *data)
    assert re.search(r"14 of 15 linear layers at 4\.\d+ bits", output)
    assert isinstance(load_model(out).model.layers[0].mlp.up_proj.weight, AAACTensor)
    output = succeed("evaluate", out, "--text", text, "--reference", model_directory, "--window", 32)
    assert "perplexity" in output
    assert "KL to reference 0.0" in output
    output = succeed("generate", out, "--prompt", "w3 w5 w7", "--new-tokens", 5, "--no-compile")
    assert "w3 w5 w7 w" in output


def test_models_larger_than_memory_are_worked_on_from_their_files(model_directory, text, tmp_path, monkeypatch):
    command = ("quantize", model_directory, "--calibration", text, "--window", 32, "--format", "nvfp4", "--out")
    output = succeed(*command, tmp_path / "loaded")
    assert "low-memory" not in output
    expected = load_model(tmp_path / "loaded").state_dict()
    monkeypatch.setattr(cli, "_free_memory", lambda: 1000)
    output = succeed(*command, tmp_path / "automatic")
    assert "0.0 GB of memory are free: working from its files, block by block (--no-low-memory" in output
    assert re.search(r"14 of 15 linear layers at 4\.\d+ bits", output)
    succeed(*command, tmp_path / "asked", "--low-memory", "--cache-dir", tmp_path)
    for name in ("automatic", "asked"):
        found = load_model(tmp_path / name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert (tmp_path / name / "tokenizer.json").exists()
    assert "not needed with --low-memory" in fail(*command, tmp_path / "c", "--low-memory", "--resume-dir", tmp_path)
    assert "neither empty nor an unfinished run" in fail(*command, tmp_path / "asked", "--low-memory")
    assert "not a local directory" in fail("quantize", "a/b", "--out", tmp_path / "d", "--low-memory")
    assert "--fisher needs the whole model" in fail(*command, tmp_path / "e", "--low-memory", "--fisher")


def test_calibration_changes_the_result(model_directory, text, tmp_path):
    succeed("quantize", model_directory, "--out", tmp_path / "a", "--calibration", text, "--window", 32)
    succeed("quantize", model_directory, "--out", tmp_path / "b")
    succeed("quantize", model_directory, "--out", tmp_path / "c", "--calibration", text, "--window", 32, "--fisher")
    weights = [load_model(tmp_path / name).model.layers[0].mlp.down_proj.weight for name in "abc"]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    assert "--fisher needs data" in fail("quantize", model_directory, "--out", tmp_path / "d", "--fisher")


def test_errors_are_one_line_with_exit_code_1(model_directory, text, tmp_path):
    out = tmp_path / "out"
    assert "format must be 'int4' or 'nvfp4', got 'int3'" in fail(
        "quantize", model_directory, "--out", out, "--format", "int3"
    )
    assert "group_size 48" in fail("quantize", model_directory, "--out", out, "--group-size", 48)
    assert "codebooks must be 'learned' or" in fail("quantize", model_directory, "--out", out, "--codebooks", "nf3")
    assert "missing.txt" in fail("quantize", model_directory, "--out", out, "--calibration", tmp_path / "missing.txt")
    assert "not an empty directory" in fail("quantize", model_directory, "--out", model_directory)
    assert fail("quantize", tmp_path / "nowhere", "--out", out)
    assert "device 'foo' cannot be used" in fail("quantize", model_directory, "--out", out, "--device", "foo")
    assert "device 'cuda:77' cannot be used" in fail("evaluate", model_directory, "--text", text, "--device", "cuda:77")
    assert not out.exists()
    assert fail("evaluate", tmp_path / "nowhere", "--text", text)
    assert "positions" in fail("generate", model_directory, "--prompt", "w1", "--new-tokens", 1000)


def test_evaluate_needs_one_text_or_tasks(model_directory, text, monkeypatch):
    assert "nothing to evaluate" in fail("evaluate", model_directory)
    assert "give one of them" in fail("evaluate", model_directory, "--text", text, "--dataset", "wikitext2")
    assert "--dataset must be wikitext2, got 'c4'" in fail("evaluate", model_directory, "--dataset", "c4")
    assert "--reference needs a text" in fail("evaluate", model_directory, "--tasks", "x", "--reference", "y")
    import aaac_ao.evaluate

    monkeypatch.setattr(aaac_ao.evaluate, "wikitext2_test", lambda: text.read_text())
    arguments = ("evaluate", model_directory, "--window", 32)
    outputs = [succeed(*arguments, "--dataset", "wikitext2"), succeed(*arguments, "--text", text)]
    first, second = (re.search(r"perplexity .* in windows of 32", output).group() for output in outputs)
    assert first == second


def test_help_is_complete():
    output = succeed("--help")
    for command in ("demo", "quantize", "evaluate", "generate"):
        assert command in output
        assert "--help" in succeed(command, "--help")
    assert call().exit_code != 0
    assert call("quantize").exit_code == 2
