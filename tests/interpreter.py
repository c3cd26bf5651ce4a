"""Kernels in Triton's interpreter, in a process of its own: Triton decides when a kernel is defined what runs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest


def interpreter_fault() -> str | None:
    """Triton 3.6's interpreter converts arrays to scalars in a way that numpy 2.4 refuses."""
    triton, numpy = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"the interpreter of triton {triton} does not run with numpy {numpy}: install numpy<2.4"
    return None


def run_in_interpreter(helper: pathlib.Path, *arguments: str) -> list[dict]:
    """What a helper prints, called with `arguments` and a seed: a list of {"kind", "case", "ratio"}."""
    if fault := interpreter_fault():
        pytest.skip(fault)
    seed = os.environ.get("AAAC_TEST_SEED", str(int.from_bytes(os.urandom(3), "little")))
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(helper), *arguments, seed]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"AAAC_TEST_SEED={seed}\n{run.stderr[-4000:]}"
    print(f"AAAC_TEST_SEED={seed}")
    return json.loads(run.stdout)
