"""The demo's second act: the same prompt continued by the original and by the quantised model, both compiled."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from aaac_ao.generate import Generation, generate

PROMPT = '''def copy_file(source, destination):
    """Copy a file."""
    with open(source, 'rb') as'''
NEW_TOKENS = 100
_COLUMN = 58


def tell(original: nn.Module, quantised: nn.Module, tokenizer: Any) -> str:
    """Both continuations side by side, with decode rates."""
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"])
    results = [generate(model, ids, NEW_TOKENS) for model in (original, quantised)]
    titles = [f"{name}: {_rate(r)}" for name, r in zip(("original fp32", "AAAC nvfp4"), results, strict=True)]
    columns = [
        [title, "-" * len(title), *_lines(tokenizer.decode(r.ids))] for title, r in zip(titles, results, strict=True)
    ]
    return "\n".join(f"{left:<{_COLUMN}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))


def _rate(result: Generation) -> str:
    return f"{result.tokens_per_second:.0f} tokens/s, compiled in {result.compile_seconds:.0f} s"


def _lines(text: str) -> list[str]:
    return [
        line[start : start + _COLUMN] for line in text.splitlines() for start in range(0, max(len(line), 1), _COLUMN)
    ]
