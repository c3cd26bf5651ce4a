"""How much errors of every layer's outputs matter to what the model predicts, from one backward pass over the data.

Of all outputs of a layer, alone and together, and of all its outputs for one token.

With g the derivatives of -log p(label) by the outputs of a layer, and labels drawn from the model's own predictions,
E[g g^T] is the layer's block of the Fisher information: to second order, an error e of the outputs adds
e^T E[g g^T] e / 2 to the KL divergence between the predictions. No label of the data is used, and no weight trained.

A token counts by the size of its g: H becomes the mean of w x x^T. To second order w would be |g|^2; it is tempered by
`TOKEN_POWER`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from aaac_ao.blocks import hooks
from aaac_ao.encode import OutputMetric
from aaac_ao.evaluate import evaluation_mode
from aaac_ao.first_pass import Batch, call_model, without_caches

#: Logits that are turned into probabilities at a time.
_CHUNK_LOGITS = 1 << 24
#: Outputs of which a layer may have more than inputs; the sums for so many take 16 MB.
SMALL_OUTPUTS = 2048
#: Seed of the labels.
_SEED = 0
#: Of |g|^2 in the weight of a token: with all of it few tokens rule, and their g depends on the labels drawn.
TOKEN_POWER = 0.5


@dataclass(frozen=True)
class Importance:
    """What matters about the outputs of layers, by name. Entries are taken out when they are used.

    Attributes:
        metrics: how errors of outputs count, and add up; some or all may be missing.
        sizes: |g| of all tokens, bf16 [tokens] for every batch, in main memory; none for layers that see only some of
            the tokens, or see them more than once.
    """

    metrics: dict[str, OutputMetric] = field(default_factory=dict)
    sizes: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def token_weights(self, names: list[str]) -> list[torch.Tensor] | None:
        """How much tokens count for layers that read the same input: fp32 [tokens] for every batch, 1 in the mean.

        None if they count alike.
        """
        found = [self.sizes.pop(name) for name in names if name in self.sizes]
        shares = [_shares([part.float().square() for part in sizes]) for sizes in found]
        if len(found) < len(names) or any(share is None for share in shares):
            return None
        weights = [torch.stack(parts).mean(0) ** TOKEN_POWER for parts in zip(*shares, strict=True)]
        return _shares(weights)


def importance_of(
    model: nn.Module, batches: Iterable[Batch], layers: Mapping[str, nn.Linear], progress: bool = True
) -> Importance:
    """The Fisher information of the outputs of layers, as the encoder takes it, and the sizes of tokens' derivatives.

    Layers with more outputs than inputs get a metric only if they have few: the matrices are large and win little.

    Args:
        model: gives logits, as `.logits` or by itself; it needs the memory of a backward pass over one batch.
        batches: token ids [batch, tokens], or dicts of keyword arguments of the model; tokens that an
            "attention_mask" leaves out do not count.
        layers: by name.
        progress: show a progress bar.

    Returns:
        Both by name; without layers that the model's predictions do not depend on.

    Raises:
        ValueError: the model gives no logits, or logits or derivatives that are NaN or infinite.
    """
    sums = {n: torch.zeros(m.out_features, m.out_features, device=m.weight.device) for n, m in layers.items()
            if m.out_features <= max(m.in_features, SMALL_OUTPUTS)}  # fmt: skip
    sizes: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    generator = None

    def watch(name: str):
        def backward(gradient: torch.Tensor) -> None:
            gradient = gradient.detach().flatten(0, -2).float()
            sizes[name].append(torch.linalg.vector_norm(gradient, dim=1).bfloat16())
            if name in sums:
                sums[name].addmm_(gradient.t(), gradient)

        def after(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:  # nothing before it does; what follows may change it in place
                output = output.detach().requires_grad_().clone()
            output.register_hook(backward)
            return output

        return after

    tokens = []
    with ExitStack() as stack:
        for context in (evaluation_mode(model), without_caches(model), _frozen(model), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(hooks(layer.register_forward_hook(watch(name)) for name, layer in layers.items()))
        for index, batch in enumerate(tqdm(batches, desc="weighing outputs", disable=not progress, unit="batch")):
            logits, mask = _logits(model, batch)
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(f"calibration batch {index} gives NaN or infinite logits; check it and the model")
            if generator is None:
                generator = torch.Generator(logits.device).manual_seed(_SEED)
            losses = nn.functional.cross_entropy(logits, _draw(logits.detach(), generator), reduction="none")
            (losses if mask is None else losses * mask.to(losses)).sum().backward()
            for own in sizes.values():  # not within the backward pass: an accelerator would be waited for every time
                own[-1:] = [part.cpu() for part in own[-1:]]
            tokens.append(len(logits))
    metrics = {}
    for name in list(sums):
        matrix = sums.pop(name)
        try:
            if bool(matrix.any()):
                metrics[name] = OutputMetric(matrix)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Importance(metrics, {name: own for name, own in sizes.items() if [len(part) for part in own] == tokens})


def _shares(parts: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Values of all tokens by their mean, fp32; None if that is 0 or not finite."""
    mean = torch.stack([part.double().sum() for part in parts]).sum() / sum(len(part) for part in parts)
    return [(part / mean).float() for part in parts] if 0 < float(mean) < torch.inf else None


def _logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[tokens, vocabulary] fp32, and which of the tokens count; None for all."""
    output = call_model(model, batch)
    mask = None if isinstance(batch, torch.Tensor) else batch.get("attention_mask")
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or not logits.requires_grad:
        raise ValueError(f"fisher=True needs a model whose output has logits, got {type(output).__name__}")
    usable = mask is not None and mask.shape == logits.shape[:-1]
    return logits.flatten(0, -2).float(), mask.flatten() if usable else None


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels [tokens] int64, each by the model's own probabilities."""
    parts = logits.split(max(1, _CHUNK_LOGITS // logits.shape[1]))
    return torch.cat([torch.multinomial(part.softmax(-1), 1, generator=generator)[:, 0] for part in parts])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients for a while."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
