"""Count the machine instructions of the kernels' main loops, without a GPU.

    python -m benchmarks.sass                 # a table of every variant and target, in Markdown
    python -m benchmarks.sass --capability 90 # one target
    python benchmarks/sass.py --check         # exit status 1 if a gate fails; needs triton and nothing else

ptxas and nvdisasm come with Triton. A main loop is the innermost loop that loads codes; a weight is one 4-bit code
that a lane decodes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import importlib.util
import itertools
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import budgets  # noqa: E402  (so that the file runs as a script, too)

CAPABILITIES = (80, 89, 90, 100, 120)
#: Where the pair table may be used: 228 KiB of shared memory hold three.
PAIR_CAPABILITIES = (90, 100)
GROUP_SIZES = (16, 32, 64, 128)
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
#: Instructions that touch shared memory, and those that wait for other warps.
SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "BAR")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    Attributes:
        kernel: "fused", or "pairs" for the pair table.
        capability: ten times the compute capability.
        dtype: of x and y.
        group_size: weights per scale.
        tokens: BLOCK_M.
        words: whether scales are loaded 4 bytes at a time.
        asm: False for the portable twin.
        act: whether x is multiplied by factors (act_pre_scale, in bf16) where it is loaded.
    """

    kernel: str
    capability: int
    dtype: str
    group_size: int
    tokens: int
    words: bool = True
    asm: bool = True
    act: bool = False

    @property
    def budget(self) -> float:
        """Instructions per weight that this variant may take."""
        size = "pairs" if self.kernel == "pairs" else "small" if self.tokens <= 16 else "medium"
        return budgets.BUDGETS[size, "nvfp4" if self.group_size == 16 else "int4"]


@dataclass(frozen=True)
class Count:
    """What the machine code of a variant does.

    Attributes:
        variant: which.
        instructions: of the main loop, per weight.
        opcodes: of the main loop, per weight, without their modifiers.
        shared: instructions of the main loop that touch shared memory or wait for other warps.
        loads: 16-byte loads of codes in the main loop.
        weights: codes that a lane decodes in one turn of the main loop.
        registers: of a lane.
        stack: bytes of a lane, where spilled registers go.
        memory: bytes of shared memory of a program.
        converted: operations of the intermediate code that move codes or weights through shared memory.
    """

    variant: Variant
    instructions: float
    opcodes: dict[str, float]
    shared: int
    loads: int
    weights: int
    registers: int
    stack: int
    memory: int
    converted: int


def kernels(module: str):
    """A module of `kernels/`, without the package around it and what that needs."""
    name = "aaac_sass_kernels"
    if name not in sys.modules:
        path = ROOT / "kernels" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")


def compile_kernel(
    kernel, capability: int, dtype: str, group_size: int, constants: dict, source=None, any_value=("M",), **options
):
    """Compile with the argument types of a launch: 16-divisible pointers and sizes, but for some of any value.

    Args:
        kernel: a jitted function.
        capability: ten times the compute capability.
        dtype: "bf16", "fp16" or "fp32", of x, y, w and bias.
        group_size: weights per scale; decides the type of scales, and whether there is a per-tensor scale.
        constants: constexpr arguments besides G; a pointer may be None.
        source: the class that carries a kernel to the compiler; Triton's ASTSource by default.
        any_value: names of the arguments that need not be divisible by 16.
        options: num_warps and the like.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {"G": group_size, **constants} if "G" in kernel.arg_names else dict(constants)
    types = {
        **dict.fromkeys(("x_ptr", "y_ptr", "w_ptr", "bias_ptr"), POINTERS[dtype]),
        "act_ptr": "*bf16",
        "qdata_ptr": "*u8",
        "scale_ptr": "*u8" if group_size == 16 else "*i16",
        "codebook_ptr": "*bf16",
        "table_ptr": "*i32",
        "partial_ptr": "*fp32",
        "per_tensor_scale_ptr": "*fp32",
        **dict.fromkeys(("target_ptr", "factor_ptr", "metric_ptr", "root_ptr", "books_ptr"), "*fp32"),
        **dict.fromkeys(("candidates_ptr", "scales_ptr", "errors_ptr", "values_ptr", "pull_ptr"), "*fp32"),
        **dict.fromkeys(("noise_ptr", "heat_ptr", "growth_ptr", "moves_ptr"), "*fp32"),
        **dict.fromkeys(("codes_ptr", "selector_ptr"), "*u8"),
        **dict.fromkeys(("ends_ptr", "offset_ptr"), "*i32"),
    }
    if group_size != 16 and "per_tensor_scale_ptr" in kernel.arg_names:
        constants["per_tensor_scale_ptr"] = None
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    code = (source or ASTSource)(
        fn=kernel,
        signature=signature,
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs={
            positions[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind != "constexpr" and name not in any_value
        },
    )
    return compile(code, target=GPUTarget("cuda", capability, 32), options=options)


def compile_variant(variant: Variant):
    """The compiled kernel, and the codes that a lane decodes in one turn of its main loop."""
    blocks = kernels("blocks")
    block = blocks.block_for(variant.tokens)
    act = {} if variant.act else {"act_ptr": None}
    if variant.kernel == "pairs":
        from triton.experimental.gluon._runtime import GluonASTSource

        pairs = kernels("pairs")
        constants = {**act, "BLOCK_M": block.tokens, "SCALED": blocks.scales_weights(block, variant.group_size)}
        compiled = compile_kernel(
            pairs.pairs_kernel,
            variant.capability,
            variant.dtype,
            variant.group_size,
            constants,
            GluonASTSource,
            num_warps=pairs.WARPS,
        )
        return compiled, pairs.TILES * 32
    constants = {
        **act,
        "BLOCK_M": block.tokens,
        "ROW_TILES": block.row_tiles,
        "TILES": block.tiles,
        "SCALED": blocks.scales_weights(block, variant.group_size),
        "WORDS": variant.words,
        "ASM": variant.asm,
    }
    kernel = kernels("fused").fused_kernel
    compiled = compile_kernel(
        kernel, variant.capability, variant.dtype, variant.group_size, constants, num_warps=1, num_stages=1
    )
    return compiled, block.row_tiles * block.tiles * 32


def tool(name: str, cubin: bytes, *flags: str) -> str:
    """What one of the tools that come with Triton prints about machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[list[str]]:
    """The instructions of every innermost loop of disassembled code: from a label to a branch back to it."""
    code, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*);", line):
            code.append(instruction[1])
            target = re.search(r"`\((\.L_\w+)\)", code[-1])
            if code[-1].startswith("BRA") and target and target[1] in labels:
                found.append((labels[target[1]], len(code)))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [code[start:stop] for start, stop in inner]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a lane."""
    usage = tool("cuobjdump", cubin, "--dump-resource-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+).*STACK:(\d+).*LOCAL:(\d+)", usage).groups())
    return registers, stack + local


def is_code_load(instruction: str) -> bool:
    """Codes are the only data that is loaded to be evicted first."""
    return instruction.startswith("LDG") and ".EF" in instruction.split()[0]


def is_table_read(instruction: str) -> bool:
    """The pair table is all that is read from shared memory."""
    return instruction.startswith("LDS")


def compile_rounding(capability: int, columns: int, group_size: int):
    """The kernel that rounds blocks for the encoder, compiled for so many columns in groups of `group_size`."""
    module = kernels("rounding")
    constants = module.tiles(columns, group_size)
    options = {"num_warps": constants.pop("num_warps"), "any_value": (*module.SIZES, *module.INPUTS)}
    return compile_kernel(module.rounding_kernel, capability, "fp32", group_size, constants, **options)


def compile_annealing(capability: int, columns: int, group_size: int):
    """The kernel that anneals codes for the encoder, compiled for weights of so many columns."""
    module = kernels("annealing")
    constants = module.tiles(columns, group_size)
    options = {"num_warps": constants.pop("num_warps"), "any_value": (*module.SIZES, *module.INPUTS)}
    return compile_kernel(module.annealing_kernel, capability, "fp32", group_size, constants, **options)


def count(variant: Variant) -> Count:
    """Compile a variant and count its main loop."""
    compiled, weights = compile_variant(variant)
    wanted = is_code_load if variant.kernel == "fused" else is_table_read
    body = max(loops(tool("nvdisasm", compiled.asm["cubin"])), key=lambda body: sum(map(wanted, body)))
    opcodes = collections.Counter(instruction.split()[0].split(".")[0] for instruction in body)
    registers, stack = resources(compiled.asm["cubin"])
    return Count(
        variant=variant,
        instructions=len(body) / weights,
        opcodes={name: number / weights for name, number in opcodes.most_common()},
        shared=sum(opcodes[name] for name in SHARED),
        loads=sum(is_code_load(instruction) and ".128" in instruction.split()[0] for instruction in body),
        weights=weights,
        registers=registers,
        stack=stack,
        memory=compiled.metadata.shared,
        converted=len(re.findall(r"ttg\.(local_alloc|local_store|local_load|async_copy)", compiled.asm["ttgir"])),
    )


def count_or_reason(variant: Variant) -> Count | str:
    """`count`, or why the pair table does not compile with a Triton whose Gluon is another."""
    try:
        return count(variant)
    except Exception as error:
        if variant.kernel != "pairs":
            raise
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def count_all(variants: list[Variant], processes: int = 2) -> list[Count | str]:
    """`count_or_reason` of many variants, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(count_or_reason, variants, chunksize=4))


def variants(capabilities=CAPABILITIES, dtypes=("bf16", "fp16")) -> list[Variant]:
    """Everything that `dispatch.linear` launches for up to 64 bf16 or fp16 tokens and aligned scales."""
    tokens = [block.tokens for block in kernels("blocks").BLOCKS]
    fused = [Variant("fused", *rest) for rest in itertools.product(capabilities, dtypes, GROUP_SIZES, tokens)]
    with_pairs = [capability for capability in capabilities if capability in PAIR_CAPABILITIES]
    try:
        groups = kernels("pairs").GROUP_SIZES
    except Exception as error:  # Gluon is experimental
        print(f"no pair table with this Triton: {error}", file=sys.stderr)
        return fused
    return fused + [Variant("pairs", *rest) for rest in itertools.product(with_pairs, dtypes, groups, tokens[:2])]


def gate(result: Count, newest: bool = False) -> list[str]:
    """What is wrong with a variant; nothing if all gates hold. The budget is for sm_90 only; `newest`: any Triton."""
    variant, wrong = result.variant, []
    small = variant.kernel == "fused" and variant.tokens <= 16
    budget = variant.budget if not newest else budgets.NEWEST_SMALL if small else float("inf")
    if variant.capability == budgets.CAPABILITY and result.instructions > budget:
        wrong.append(f"{result.instructions:.2f} instructions per weight, the budget is {budget}")
    if result.stack:
        wrong.append(f"{result.stack} bytes of registers spill")
    if variant.kernel == "pairs":
        if result.shared * 2 != result.weights:
            wrong.append(f"{result.shared} accesses to shared memory for {result.weights} weights of a lane")
        if result.memory != kernels("pairs").TABLE_BYTES:
            wrong.append(f"{result.memory} bytes of shared memory: the table does not start where its reads expect it")
    else:
        if result.shared:
            wrong.append(f"{result.shared} instructions of the main loop use shared memory")
        if result.converted:
            wrong.append(f"{result.converted} operations move codes or weights through it, in the main loop or outside")
        if result.loads * 32 != result.weights:
            wrong.append(f"{result.loads} loads of 16 bytes for {result.weights} codes of a lane")
        if result.opcodes.get("SHFL") != 1:
            wrong.append(f"{result.opcodes.get('SHFL', 0):.2f} shuffles per weight")
    return wrong


def rows(results: list[Count]) -> list[list]:
    """Rows of the table: one kernel, dtype, group and block each, with a column for every target."""
    by_row = collections.defaultdict(dict)
    for result in results:
        v = result.variant
        by_row[v.kernel, v.dtype, v.group_size, v.tokens, v.budget][v.capability] = result
    return [
        [
            *key,
            *(f"{r[c].instructions:.2f}" if c in r else "" for c in CAPABILITIES),
            max(x.registers for x in r.values()),
        ]
        for key, r in by_row.items()
    ]


def main() -> int:
    """Print the table, or check the gates."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="one target only")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="one dtype only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a gate fails")
    arguments = parser.parse_args()
    capabilities = (arguments.capability,) if arguments.capability else CAPABILITIES
    dtypes = (arguments.dtype,) if arguments.dtype else ("bf16", "fp16")
    newest = not triton.__version__.startswith(budgets.TRITON + ".")
    counted = count_all(variants(capabilities, dtypes), arguments.processes)
    results = [result for result in counted if isinstance(result, Count)]
    failures = {result for result in counted if isinstance(result, str)}
    header = ["kernel", "x", "group", "tokens", "budget", *(f"sm_{c}" for c in CAPABILITIES), "registers"]
    print(f"Triton {triton.__version__}\n")
    for row in [header, ["-" * len(name) for name in header], *rows(results)]:
        print("| " + " | ".join(str(cell).ljust(len(name)) for cell, name in zip(row, header, strict=True)) + " |")
    for failure in failures:
        print(f"\nThe pair table does not compile, the shuffle kernel takes its place. {failure}")
    wrong = [(result.variant, gate(result, newest)) for result in results]
    for variant, reasons in wrong:
        if reasons:
            print(f"\n{variant}: {'; '.join(reasons)}")
    faults = any(reasons for _, reasons in wrong) or (bool(failures) and not newest)
    return int(arguments.check and faults)


if __name__ == "__main__":
    sys.exit(main())
