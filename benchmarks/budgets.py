"""How many machine instructions the kernels may spend on a weight, in their main loops.

An H200 has to retire about 30 weights per clock and multiprocessor to use its memory; a multiprocessor issues 128 lane
instructions per clock. The bounds hold for Triton 3.6 and sm_90; `benchmarks/sass.py` counts.
"""

from __future__ import annotations

#: By kernel: "small" for up to 16 tokens, "medium" for 17 to 64; by scale format.
BUDGETS = {
    ("small", "int4"): 4.0,
    ("small", "nvfp4"): 4.4,
    ("medium", "int4"): 5.2,
    ("medium", "nvfp4"): 5.2,
    ("pairs", "int4"): 2.6,
    ("pairs", "nvfp4"): 2.6,
}
#: The Triton and the target that the budgets are for, and the bound for small M with any newer Triton.
TRITON, CAPABILITY = "3.6", 90
NEWEST_SMALL = 5.2
