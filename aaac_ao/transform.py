"""What `torchao.quantization.quantize_` does with an `AAACConfig`, module by module and in place."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from aaac_ao.config import AAACConfig
from aaac_ao.encode import check_weight
from aaac_ao.observer import ObserverTensor
from aaac_ao.tensor import AAACTensor

logger = logging.getLogger(__name__)

#: Modules found sound by the check of a whole `quantize_` call, until their turn comes, and what exactly was checked.
_sound: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


@register_quantize_module_handler(AAACConfig)
def transform(module: nn.Module, config: AAACConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Apply one step of `config` to `module.<parameter_name>` and return the same module.

    Weights that are quantised already, by this or another config, weights smaller than a group, and at "convert"
    weights that were never prepared are left alone with a log line. Every weight that the surrounding `quantize_`
    call selects is checked before the first one is changed, so that a refused model is left as it was.

    Raises:
        ValueError, TypeError: a weight that cannot be quantised, or that saw no calibration batch; the message names
            the layers.
    """
    weight = getattr(module, parameter_name, None)
    if weight is not None and (reason := is_left_alone(weight, config)):
        logger.info("%s %s: left as it is", _describe(module), reason)
        return module
    if config.step != "prepare_for_loading":
        _check_selected(module, config, parameter_name)
    apply_step(module, config, parameter_name)
    return module


def apply_step(module: nn.Module, config: AAACConfig, parameter_name: str = "weight") -> None:
    """Replace `module.<parameter_name>` by what follows it in `config.step`; for weights that were checked before."""
    set_weight(module, _next_weight(getattr(module, parameter_name), config), parameter_name)


def set_weight(module: nn.Module, weight: torch.Tensor, parameter_name: str = "weight") -> None:
    """Make `weight` the parameter of a module, and let a quantised linear layer show it."""
    setattr(module, parameter_name, nn.Parameter(weight, requires_grad=False))
    if isinstance(module, nn.Linear) and isinstance(weight, AAACTensor):
        module.extra_repr = types.MethodType(_linear_repr, module)


def _next_weight(weight: torch.Tensor, config: AAACConfig) -> torch.Tensor:
    if config.step == "prepare":
        if isinstance(weight, ObserverTensor):
            return weight
        return ObserverTensor.from_hp(weight, full=config.rounding != "nearest")
    if config.step == "prepare_for_loading":
        hp_weight = weight.hp_data if isinstance(weight, ObserverTensor) else weight
        return AAACTensor.empty(tuple(hp_weight.shape), config, hp_weight.dtype, hp_weight.device)
    if config.step == "convert":
        return AAACTensor.from_hp(weight.hp_data, config, weight.sums.statistics())
    return AAACTensor.from_hp(weight.detach(), config)


def _linear_repr(module: nn.Linear) -> str:
    return f"in_features={module.in_features}, out_features={module.out_features}, weight={module.weight!r}"


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear({module.in_features} -> {module.out_features})"
    return type(module).__name__


def is_left_alone(weight: torch.Tensor, config: AAACConfig) -> str | None:
    """Why a weight is passed over without an error, or None."""
    observed = isinstance(weight, ObserverTensor)
    if isinstance(weight, TorchAOBaseTensor) and not observed:
        return f"is quantised already ({type(weight).__name__})"
    if weight.dim() == 2 and weight.shape[1] < config.group_size and not observed:
        return f"has in_features {weight.shape[1]}, fewer than group_size {config.group_size}"
    if config.step == "convert" and not observed:
        return "was not prepared"
    return None


# checks before the first change


def problem_with(weight: torch.Tensor, config: AAACConfig) -> str | None:
    """Why `config` cannot be applied to a weight, or None if it can (or the weight would be left alone)."""
    if is_left_alone(weight, config):
        return None
    observed = isinstance(weight, ObserverTensor)
    if config.step is None and observed:
        return "is being observed: use step='convert'"
    if config.step is None and config.needs_hessian:
        return f"rounding={config.rounding!r} needs data: use steps 'prepare' and 'convert', or calibrate_"
    if config.step == "convert" and config.needs_hessian and weight.hessian is None:
        return "was prepared with rounding='nearest', which does not gather what second-order rounding needs"
    try:
        check_weight(weight.hp_data if observed else weight, config)
        if config.step == "convert":
            _check_statistics(weight)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _check_statistics(weight: ObserverTensor) -> None:
    if not bool(torch.isfinite(weight.sums.statistics().second_moment).all()):
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
    if _sound.pop(module, None) == _identity(module, config, parameter_name):
        return
    root, filter_fn = _calling_model(module, config)
    problems, sound = {}, {}
    for name, candidate in root.named_modules():
        if candidate is not module and not filter_fn(candidate, name):
            continue
        weight = getattr(candidate, parameter_name, None)
        if not isinstance(weight, torch.Tensor) or is_parametrized(candidate, parameter_name):
            problem = f"has no parameter {parameter_name!r}"
        else:
            problem = problem_with(weight, config)
        if problem is not None:
            problems[name or _describe(candidate)] = problem
        elif candidate is not module:
            sound[candidate] = _identity(candidate, config, parameter_name)
    raise_problems(problems)
    _sound.update(sound)


def _identity(module: nn.Module, config: AAACConfig, parameter_name: str) -> tuple:
    """What a check holds for: this weight, with these values, under this config."""
    weight = getattr(module, parameter_name, None)
    version = None if weight is None or weight.is_inference() else weight._version
    return id(config), id(weight), version


def _calling_model(module: nn.Module, config: AAACConfig) -> tuple[nn.Module, Callable[[nn.Module, str], bool]]:
    """The model and filter of the `quantize_` call that this handler runs in; the module alone if there is none.

    torchao hands over one module at a time without its name or its model. Both stand in the local variables of
    `quantize_`, which are read here to refuse a bad model before it is half converted and to name its layers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is quantize_.__code__:
            if frame.f_locals["config"] is config:  # not one of a config that wraps ours and chooses layers itself
                return frame.f_locals["model"], frame.f_locals["filter_fn"]
            break
        frame = frame.f_back
    return module, lambda candidate, name: candidate is module
