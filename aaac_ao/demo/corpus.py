"""Text for the demo: the sources of the Python standard library found on this machine.

Nothing is shipped: the demo model was trained on these files, is calibrated on them, and is
evaluated on modules that were held out of training. All of `HELD_OUT` exists in every Python from 3.10.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

#: Modules never seen in training; perplexity and KL are measured on them.
HELD_OUT = (
    "calendar.py",
    "cmd.py",
    "configparser.py",
    "contextlib.py",
    "csv.py",
    "fractions.py",
    "gettext.py",
    "heapq.py",
    "ipaddress.py",
    "queue.py",
    "sched.py",
    "selectors.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)

#: Folders without ordinary code: tests, third-party packages, tables of characters, generated help texts.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
_EXCLUDED_FILES = {"pydoc_data/topics.py", "html/entities.py", "antigravity.py", "this.py"}


def stdlib_files() -> list[Path]:
    """Every ordinary source file of the standard library, sorted by its path inside it.

    Raises:
        FileNotFoundError: this Python carries no library sources (a frozen or stripped build).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() not in _EXCLUDED_FILES:
            found.append(path)
    if not found:
        raise FileNotFoundError(f"no Python sources under {root}; run the demo with a full Python installation")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def held_out_texts() -> Iterator[str]:
    """The held-out modules of this Python, in the order of `HELD_OUT`.

    Raises:
        FileNotFoundError: a held-out module is missing.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in HELD_OUT:
        yield _read(root / name)


def training_texts() -> Iterator[str]:
    """All other modules: what the model was trained on, and what calibrates it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files():
        if path.relative_to(root).as_posix() not in HELD_OUT:
            yield _read(path)


def token_stream(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """All texts as one stream of ids, each followed by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
