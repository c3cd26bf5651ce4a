"""Benchmarks: every figure that the documents claim, as a script that prints it.

They also run from a checkout that was not installed, as on a lent GPU: `aaac_ao.kernels` is the folder `kernels` there.
"""

import importlib.util
import pathlib
import sys


def _use_checkout() -> None:
    """Make `aaac_ao.kernels` importable where `aaac_ao` comes from this checkout."""
    root = pathlib.Path(__file__).resolve().parent.parent
    package = importlib.util.find_spec("aaac_ao")
    if "aaac_ao.kernels" in sys.modules or package is None or pathlib.Path(package.origin).parent.parent != root:
        return
    folder = root / "kernels"
    spec = importlib.util.spec_from_file_location(
        "aaac_ao.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["aaac_ao.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["aaac_ao.kernels"])


_use_checkout()
