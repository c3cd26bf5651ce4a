"""lm-eval's tasks against likelihoods that are computed here, on a task of our own: nothing is fetched."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torchao.quantization import quantize_
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from aaac_ao import AAACConfig
from aaac_ao.integrations.lm_eval import lm_eval_tasks


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0")


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task in a folder; returns its examples."""
    rows = [
        {"question": f"w{a} w{b} w{c}", "choices": [f"w{d}", f"w{e}"], "answer": a % 2}
        for a, b, c, d, e in torch.randint(1, 97, (12, 5)).tolist()
        if d != e
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "words.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    return folder, rows


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """lm-eval and datasets, kept from the network and from the user's cache."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def accuracy(model, tokenizer, rows) -> float:
    """Share of examples whose right choice is the likelier next word."""
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["question"])["input_ids"]])).logits[0, -1]
        first, second = (logits[tokenizer(choice)["input_ids"][0]] for choice in row["choices"])
        right += int(first < second) == row["answer"]
    return right / len(rows)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("quantised", [False, True])
def test_accuracy_of_a_local_task(tiny_llama, tokenizer, task, quantised):
    folder, rows = task
    model = tiny_llama().train()
    if quantised:
        quantize_(model.model, AAACConfig(format="nvfp4"))
    results = lm_eval_tasks(model, tokenizer, ["words"], include_path=folder, batch_size=3)
    assert list(results) == ["words"]
    assert results["words"]["acc,none"] == pytest.approx(accuracy(model, tokenizer, rows))
    assert model.training
    limited = lm_eval_tasks(model, tokenizer, ["wor*"], limit=2, include_path=folder)
    assert limited["words"]["acc,none"] == pytest.approx(accuracy(model, tokenizer, rows[:2]))


@pytest.mark.usefixtures("offline")
def test_tasks_from_the_command_line(tiny_llama, tokenizer, task, tmp_path, monkeypatch):
    import lm_eval.tasks

    from aaac_ao.cli import app

    manager = lm_eval.tasks.TaskManager  # reading lm-eval's own thousands of tasks would take most of the time

    folder, rows = task
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--tasks", "words", "--include-path", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"words: acc {accuracy(model, tokenizer, rows):.4f} ± 0." in result.output
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **kwargs: manager(**kwargs | {"include_defaults": False}))
    result = CliRunner().invoke(app, [*command[:3], "no_such_task"])
    assert result.exit_code == 1
    assert "no_such_task" in result.output


def test_bad_arguments(tiny_llama, tokenizer, tmp_path):
    model = tiny_llama()
    for tasks in ([], "arc_easy"):
        with pytest.raises(ValueError, match="at least one name"):
            lm_eval_tasks(model, tokenizer, tasks)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        lm_eval_tasks(model, tokenizer, ["words"], limit=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        lm_eval_tasks(model, tokenizer, ["words"], batch_size=-1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lm_eval_tasks(model, tokenizer, ["words"], include_path=tmp_path / "nowhere")


def test_without_lm_eval(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"aaac-ao\[eval\]"):
        lm_eval_tasks(tiny_llama(), tokenizer, ["words"])
