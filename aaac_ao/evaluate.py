"""How much a quantised model lost: perplexity, KL divergence to the original, and the share of the gap recovered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

#: Logits of reference and model are compared this many tokens at a time: bounded memory at any vocabulary.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        perplexity: exp of the mean loss in nats per predicted token.
        kl: mean KL(reference || model) in nats per predicted token; None without a reference.
        tokens: number of predicted tokens.
    """

    perplexity: float
    kl: float | None
    tokens: int


def windows_of(ids: torch.Tensor | Sequence[int], length: int, limit: int | None = None) -> torch.Tensor:
    """Cut a token stream into non-overlapping windows [count, length], the protocol of GPTQ (arXiv 2210.17323).

    Args:
        ids: 1-D token ids; a rest shorter than `length` is dropped.
        length: tokens per window, at least 2.
        limit: keep at most this many windows, evenly spaced.

    Raises:
        ValueError: fewer tokens than one window, or a window without a token to predict.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or length < 2 or len(ids) < length:
        raise ValueError(f"cannot cut windows of {length} tokens from ids of shape {list(ids.shape)}")
    windows = ids[: len(ids) // length * length].view(-1, length)
    if limit is not None and limit < len(windows):
        windows = windows[torch.linspace(0, len(windows) - 1, limit).round().long()]
    return windows


def wikitext2_test() -> str:
    """The test split of WikiText-2 (raw) as one text, joined as GPTQ's evaluation does (arXiv 2210.17323).

    Perplexities on non-overlapping windows of 2048 tokens of this text are what papers compare.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: the data is not in the cache and cannot be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("wikitext2 needs datasets; install it with: pip install 'aaac-ao[eval]'") from error
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # the library raises its own, urllib's, aiohttp's and huggingface_hub's errors
        raise OSError(
            f"wikitext2 cannot be loaded ({type(error).__name__}: {error}); without a network, load it once on a "
            "machine that has one and copy the cache ($HF_HOME), or evaluate on a text file"
        ) from error
    return "\n\n".join(rows["text"])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: torch.Tensor,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a causal language model on token windows, and its divergence from a reference.

    Args:
        model: called as model(input_ids), must return `.logits` [batch, tokens, vocabulary].
        windows: [count, length] token ids, see `windows_of`.
        reference: the original model, on the same device.
        batch_size: windows per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: `windows` is not 2-D or empty, or the model gives NaN logits.
    """
    if windows.dim() != 2 or windows.numel() == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [count, length >= 2], got {list(windows.shape)}")
    device = next(model.parameters()).device
    loss = kl = torch.zeros((), dtype=torch.float64)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    with evaluation_mode(model, reference):
        for batch in tqdm(windows.split(batch_size), desc="evaluating", disable=not progress, leave=False):
            batch = batch.to(device)
            targets = batch[:, 1:].flatten()
            logits = _logits(model, batch)
            reference_logits = None if reference is None else _logits(reference, batch)
            for part in torch.arange(len(targets), device=device).split(_CHUNK_TOKENS):
                log_q = logits[part].float().log_softmax(-1)
                loss = loss - log_q.gather(1, targets[part, None]).sum().double().cpu()
                if reference_logits is not None:
                    log_p = reference_logits[part].float().log_softmax(-1)
                    terms = log_p.exp() * (log_p - log_q)
                    kl = kl + terms.masked_fill_(log_p == -math.inf, 0).sum().double().cpu()  # 0 log 0 = 0
    if not (math.isfinite(float(loss)) and math.isfinite(float(kl))):
        raise ValueError("the model or its reference gives NaN or infinite logits")
    mean_kl = None if reference is None else float(kl) / tokens
    return Evaluation(float(torch.exp(loss / tokens)), mean_kl, tokens)


@contextmanager
def evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode, undone module by module at the end."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).logits[:, :-1].flatten(0, 1)


def unigram_perplexity(train_ids: torch.Tensor, windows: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of the token frequencies of `train_ids` (add-one smoothed) on `windows`: knowing nothing else."""
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1
    return float((-(counts / counts.sum()).log()[windows[:, 1:]].mean()).exp())


def gap_recovered(value: float, baseline: float, reference: float) -> float:
    """Share of the loss of a baseline that a method wins back: 1 is the reference, 0 the baseline, below 0 worse.

    Raises:
        ValueError: the baseline equals the reference: there is no gap.
    """
    if baseline == reference:
        raise ValueError(f"no gap to recover: baseline and reference are both {baseline}")
    return 1 - (value - reference) / (baseline - reference)


def linear_bits_per_weight(modules: Iterable[nn.Module]) -> float:
    """Stored bits per weight over the weights of linear modules, true to the byte."""
    stored = weights = 0
    for module in modules:
        weight = module.weight
        stored += getattr(weight, "stored_bytes", weight.numel() * weight.element_size())
        weights += weight.numel()
    return 8 * stored / weights
