"""Benchmarks: every figure that the documents claim, as a script that prints it.

They also run from a checkout that was not installed, as on a lent GPU: `aaac_ao.kernels` is then the folder `kernels`.
"""

import importlib.metadata
import importlib.util
import pathlib
import sys


def _use_checkout() -> None:
    try:
        importlib.metadata.distribution("aaac-ao")
    except importlib.metadata.PackageNotFoundError:
        folder = pathlib.Path(__file__).resolve().parent.parent / "kernels"
        spec = importlib.util.spec_from_file_location(
            "aaac_ao.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["aaac_ao.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["aaac_ao.kernels"])


_use_checkout()
