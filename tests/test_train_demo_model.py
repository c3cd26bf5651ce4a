"""The trainer of the demo model writes a model that loads, and goes on where it was stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from aaac_ao.integrations.transformers import load_model

TOOL = Path(__file__).resolve().parents[1] / "tools" / "train_demo_model.py"


@pytest.fixture
def trainer(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_demo_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.corpus, "training_texts", lambda: [TOOL.read_text()] * 3)
    monkeypatch.setattr(module.corpus, "held_out_texts", lambda: [Path(__file__).read_text()] * 2)
    return module


def test_trains_saves_and_resumes(trainer, tmp_path, monkeypatch):
    def run(minutes: float) -> list[dict]:
        size = [
            "--hidden",
            "64",
            "--layers",
            "1",
            "--vocab-size",
            "400",
            "--context",
            "32",
            "--batch",
            "2",
            "--report-seconds",
            "0.2",
            "--no-bf16",
        ]
        places = ["--out", str(tmp_path / "model"), "--checkpoint", str(tmp_path / "build" / "state.pt")]
        monkeypatch.setattr(sys, "argv", ["train", "--minutes", str(minutes), "--device", "cpu", *size, *places])
        trainer.main()
        return [json.loads(line) for line in (tmp_path / "model" / "training_log.jsonl").read_text().splitlines()]

    first = run(0.01)
    second = run(0.02)
    assert second[: len(first)] == first
    assert second[0]["parameters"] > 0
    assert second[-1]["step"] > first[-1]["step"] > 0
    assert min(row["held_out_loss"] for row in second[1:]) == min(row["best"] for row in second if "best" in row)
    assert second[-1]["held_out_loss"] < second[0]["unigram_loss"] + 1
    model = load_model(tmp_path / "model")
    assert model.config.tie_word_embeddings
    assert str(model.dtype) == "torch.bfloat16"
