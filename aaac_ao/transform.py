"""What `torchao.quantization.quantize_` does with an `AAACConfig`, module by module and in place."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from aaac_ao.config import AAACConfig
from aaac_ao.encode import check_weight
from aaac_ao.observer import ObserverTensor
from aaac_ao.tensor import AAACTensor

logger = logging.getLogger(__name__)

#: Modules found sound by the check of a whole `quantize_` call, until their turn comes, with the config of that call.
_sound: WeakKeyDictionary[nn.Module, AAACConfig] = WeakKeyDictionary()


@register_quantize_module_handler(AAACConfig)
def transform(module: nn.Module, config: AAACConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Apply one step of `config` to `module.<parameter_name>` and return the same module.

    Already quantised weights, weights smaller than a group, and at "convert" weights that were never prepared are left
    alone with a log line. Every weight that the surrounding `quantize_` call selects is checked before the first one is
    changed, so that a refused model is left as it was.

    Raises:
        ValueError, TypeError: a weight that cannot be quantised, or that saw no calibration batch; the message names
            the layers.
    """
    weight = getattr(module, parameter_name)
    if isinstance(weight, AAACTensor):
        logger.info("%s is quantised already: left as it is", _describe(module))
        return module
    if _too_small(weight, config):
        message = "%s: in_features %d is smaller than group_size %d: left in %s"
        logger.info(message, _describe(module), weight.shape[1], config.group_size, weight.dtype)
        return module
    if config.step == "convert" and not isinstance(weight, ObserverTensor):
        logger.info("%s was not prepared: left as it is", _describe(module))
        return module
    if config.step != "prepare_for_loading":
        _check_selected(module, config, parameter_name)
    apply_step(module, config, parameter_name)
    return module


def apply_step(module: nn.Module, config: AAACConfig, parameter_name: str = "weight") -> None:
    """Replace `module.<parameter_name>` by what follows it in `config.step`; for weights that were checked before."""
    weight = _next_weight(getattr(module, parameter_name), config)
    setattr(module, parameter_name, nn.Parameter(weight, requires_grad=False))
    if isinstance(module, nn.Linear) and isinstance(weight, AAACTensor):
        module.extra_repr = types.MethodType(_linear_repr, module)


def _next_weight(weight: torch.Tensor, config: AAACConfig) -> torch.Tensor:
    if config.step == "prepare":
        return weight if isinstance(weight, ObserverTensor) else ObserverTensor.from_hp(weight)
    if config.step == "prepare_for_loading":
        hp_weight = weight.hp_data if isinstance(weight, ObserverTensor) else weight
        return AAACTensor.empty(tuple(hp_weight.shape), config, hp_weight.dtype, hp_weight.device)
    if config.step == "convert":
        return AAACTensor.from_hp(weight.hp_data, config, weight.statistics())
    return AAACTensor.from_hp(weight.detach(), config)


def _linear_repr(module: nn.Linear) -> str:
    return f"in_features={module.in_features}, out_features={module.out_features}, weight={module.weight!r}"


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear({module.in_features} -> {module.out_features})"
    return type(module).__name__


def _too_small(weight: torch.Tensor, config: AAACConfig) -> bool:
    return weight.dim() == 2 and weight.shape[1] < config.group_size


# checks before the first change


def problem_with(weight: torch.Tensor, config: AAACConfig) -> str | None:
    """Why `config` cannot be applied to a weight, or None if it can (or the weight would be left alone)."""
    if isinstance(weight, AAACTensor) or _too_small(weight, config):
        return None
    observed = isinstance(weight, ObserverTensor)
    if config.step == "convert" and not observed:
        return None
    if config.step is None and observed:
        return "is being observed: use step='convert'"
    try:
        check_weight(weight.hp_data if observed else weight, config)
        if config.step == "convert":
            _check_statistics(weight)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _check_statistics(weight: ObserverTensor) -> None:
    if not bool(torch.isfinite(weight.statistics().second_moment).all()):
        raise ValueError("the calibration batches gave NaN or infinite inputs")


def raise_problems(problems: dict[str, str]) -> None:
    """Raise one ValueError that names every layer with a problem; nothing if there is none."""
    if problems:
        shown = [f"  {name}: {problem}" for name, problem in list(problems.items())[:20]]
        more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(
            "\n".join([f"{len(problems)} layer(s) cannot be quantised; nothing was changed:", *shown, *more])
        )


def _check_selected(module: nn.Module, config: AAACConfig, parameter_name: str) -> None:
    """Check all weights that this `quantize_` call will hand over, once, before the first of them changes."""
    if _sound.pop(module, None) is config:
        return
    root, filter_fn = _calling_model(module)
    problems, sound = {}, []
    for name, candidate in root.named_modules():
        selected = candidate is module or (isinstance(candidate, nn.Linear) and filter_fn(candidate, name))
        weight = getattr(candidate, parameter_name, None) if selected else None
        problem = problem_with(weight, config) if isinstance(weight, torch.Tensor) else None
        if problem is not None:
            problems[name or _describe(candidate)] = problem
        elif selected and candidate is not module:
            sound.append(candidate)
    raise_problems(problems)
    _sound.update((candidate, config) for candidate in sound)


def _calling_model(module: nn.Module) -> tuple[nn.Module, Callable[[nn.Module, str], bool]]:
    """The model and filter of the `quantize_` call that this handler runs in; the module alone if there is none.

    torchao hands over one module at a time without its name or its model. Both stand in the local variables of the
    caller, which is read here to refuse a bad model before it is half converted and to name its layers.
    """
    found: tuple[nn.Module, Callable[[nn.Module, str], bool]] = (module, lambda candidate, name: candidate is module)
    frame = sys._getframe(1)
    while frame is not None:
        model = frame.f_locals.get("model")
        if isinstance(model, nn.Module) and "filter_fn" in frame.f_locals and any(m is module for m in model.modules()):
            found = (model, frame.f_locals["filter_fn"] or (lambda candidate, name: True))
        frame = frame.f_back
    return found
