"""A quality run of this package's own methods: `python ours.py JOB`, started by `benchmarks.quality`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import peer_job
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor, calibrate_
from aaac_ao.encode import rounding, second_order

BATCH = 8


def _leave_fits_out() -> None:
    second_order.SecondOrder._with_fitted_books = lambda self, weight, encoding, config: encoding
    second_order.fit_scales = lambda entries, scale, *_, **__: scale


#: How to leave a step of second-order rounding out, to see what it adds.
STEPS: dict[str, Callable[[], None]] = {
    "choice": lambda: setattr(second_order, "FEEDBACK_SCALES", (0, 0.0)),
    "sweeps": lambda: setattr(rounding, "SWEEPS", 0),
    "descent": lambda: setattr(second_order, "descend", lambda weight, hessian, grid, codes, *_: (grid, codes)),
    "fit": _leave_fits_out,
    "annealing": lambda: setattr(second_order, "anneal", lambda weight, hessian, grid, codes: codes),
}


def quantise(model: nn.Module, job: peer_job.Job) -> None:
    """Quantise in place.

    Options: `config` for AAACConfig; `calibrate` for calibrate_, None there for no data; `without`, the steps left out.
    """
    for step in job.options.get("without", ()):
        STEPS[step]()
    config = AAACConfig(**job.options["config"])
    arguments: dict[str, Any] | None = job.options["calibrate"]
    if arguments is None:
        layers = peer_job.linear_layers(model)
        quantize_(model, config, lambda module, name: name in layers)
    else:
        calibrate_(model, config, job.ids.split(BATCH), progress=False, **arguments)


def outcome(model: nn.Module, job: peer_job.Job, state: None) -> peer_job.Outcome:
    """Every parameter but the embeddings: AWQ scales move norms, too."""
    kept = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    found = peer_job.Outcome()
    for name, parameter in model.named_parameters():
        if id(parameter) in kept:
            continue
        quantised = isinstance(parameter, AAACTensor)
        found.weights[name] = parameter.dequantize() if quantised else parameter.data.clone()
        if quantised:
            found.stored_bytes[name.removesuffix(".weight")] = parameter.stored_bytes
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    peer_job.main(("torchao",), quantise, outcome)
