"""Tasks of EleutherAI's lm-evaluation-harness, through its own Python API, on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from aaac_ao.evaluate import evaluation_mode


def lm_eval_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on a transformers model, quantised or not.

    Args:
        model: the model, on any device; its training mode is kept.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups, such as "arc_easy"; wildcards are allowed.
        limit: use only the first examples of every task; None: all of them.
        batch_size: requests per forward pass.
        include_path: a folder with tasks of your own, as lm-eval's YAML files.

    Returns:
        Task -> metric -> value, with lm-eval's names: {"arc_easy": {"acc,none": 0.61, "acc_stderr,none": 0.01, ...}}.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no task, one that lm-eval does not know, or a limit or batch size below 1.
        FileNotFoundError: `include_path` is not a folder.
        OSError: the data of a task cannot be loaded.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list with at least one name, got {tasks!r}")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {str(include_path)!r} is not a folder")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval ({error}); install it with: pip install 'aaac-ao[eval]'") from error
    own = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if own is not None and _unknown(manager, tasks):
        manager = TaskManager(include_path=own)  # reads thousands of files: only where it must
    unknown = _unknown(manager, tasks)
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists all, or set include_path"
        )
    with evaluation_mode(model):
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=manager.match_tasks(list(tasks)),
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name])]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics, named "name,filter", without the "N/A" of errors that are not estimated."""
    return {key: float(v) for key, v in metrics.items() if "," in key and isinstance(v, int | float)}
