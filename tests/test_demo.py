"""The demo's corpus, comparison and story, on a small random model."""

import sysconfig
from pathlib import Path

import pytest
import torch

from aaac_ao.demo import compare, corpus, story


class Tokenizer:
    """Bytes of the text as ids: enough for the demo's plumbing."""

    eos_token_id = 0

    def __call__(self, text, verbose=True):
        return {"input_ids": [byte % 97 for byte in text.encode()][:600]}

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


def test_held_out_modules_exist_and_are_not_trained_on():
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = list(corpus.held_out_texts())
    assert len(held_out) == len(corpus.HELD_OUT)
    assert all((root / name).is_file() for name in corpus.HELD_OUT)
    training = set(corpus.training_texts())
    assert training.isdisjoint(held_out)
    assert len(training) > 100
    assert not any("test" in path.relative_to(root).parts for path in corpus.stdlib_files())


def test_comparison(tiny_llama, monkeypatch):
    monkeypatch.setattr(compare, "WINDOW", 32)
    monkeypatch.setattr(compare, "CALIBRATION_WINDOWS", 4)
    result = compare.compare(tiny_llama(), Tokenizer(), windows=2, progress=False)
    names = [(row.format, row.method) for row in result.rows]
    methods = ["RTN", "NF4", "BOF4-S", "IF4", "AAAC, nearest", "AAAC"]
    assert names == [(None, "original (bf16)")] + [(f, m) for f in ("nvfp4", "int4") for m in methods]
    assert all(row.kl_recovered == 0 for row in result.rows if row.method == "RTN")
    best = {row.format: row for row in result.rows if row.method == "AAAC"}
    assert all(row.kl_recovered > 0 for row in best.values())
    assert best["nvfp4"].bits < 4.7
    text = compare.table(result)
    assert text.count("\n") == len(result.rows) + 1
    monkeypatch.setattr(story, "NEW_TOKENS", 4)
    monkeypatch.setattr(story, "generate", lambda model, ids, n: _generate(model, ids % 97, n))
    monkeypatch.setattr(story, "PROMPT", "def f")
    told = story.tell(tiny_llama(), result.models["nvfp4"], Tokenizer())
    assert "AAAC nvfp4" in told
    assert all(len(line) <= 2 * 58 + 3 for line in told.splitlines())


def _generate(model, ids, new_tokens):
    from aaac_ao.generate import generate

    return generate(model, ids, new_tokens, compile_step=False)


@pytest.mark.skipif(not (compare.MODEL_DIRECTORY / "model.safetensors").exists(), reason="the model is not built yet")
def test_shipped_model_knows_python():
    model, tokenizer = compare.load_demo_model()
    ids = torch.tensor(tokenizer("import os\n\n\ndef main():\n    for name in os.listdir(path):\n")["input_ids"])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    assert loss < 4.5  # a unigram model is at 6.6
    files = sum(path.stat().st_size for path in compare.MODEL_DIRECTORY.iterdir())
    assert files < 16e6
