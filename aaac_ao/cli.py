"""`aaac-ao`: demo, quantise, evaluate and generate from the command line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(
    help="4-bit weights with two learned codebooks per layer (AAAC) for PyTorch language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="A local model directory in transformers' format, or a hub name.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]


def _friendly(command: Callable) -> Callable:
    """Errors a user can act on become one line on stderr and exit code 1; an interrupt becomes exit code 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        _quiet_libraries()
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


def _quiet_libraries() -> None:
    """Our own warnings go to stderr; start-up chatter of the libraries below is left out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")


@app.command()
@_friendly
def demo(
    windows: Annotated[int, typer.Option(help="Evaluation windows of 512 held-out tokens.", min=1)] = 64,
    text: Annotated[bool, typer.Option(help="Also generate text, compiled, from the original and from AAAC.")] = True,
) -> None:
    """Quantise the shipped demo model in every way, compare what each way loses, and generate text from it."""
    from aaac_ao.demo import compare, story

    model, tokenizer = compare.load_demo_model()
    typer.echo("A small Llama, trained on Python's standard library; evaluated on modules it never saw.")
    comparison = compare.compare(model, tokenizer, windows)
    original = comparison.rows[0].evaluation
    typer.echo(f"\n{compare.table(comparison)}\n")
    typer.echo(
        f"{original.tokens} held-out tokens; a unigram model has perplexity {comparison.unigram_perplexity:.0f}. "
        "The gaps are the shares of round-to-nearest's loss (RTN, same format) that a method wins back."
    )
    if text:
        typer.echo(story.tell(model, comparison.models["nvfp4"], tokenizer))


@app.command()
@_friendly
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    format: Annotated[str, typer.Option(help="int4 (bf16 scales) or nvfp4 (E4M3 scales, groups of 16).")] = "int4",
    group_size: Annotated[int | None, typer.Option(help="int4: 128 (default), 64, 32; nvfp4: 16.")] = None,
    codebooks: Annotated[str, typer.Option(help="learned, int4, fp4, nf4, bof4, bof4-s or if4.")] = "learned",
    rounding: Annotated[
        str, typer.Option(help="gptq, gptq-thorough, nearest; auto: gptq with --calibration, nearest without.")
    ] = "auto",
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text file to calibrate on; repeat for more. Without one: no data.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows to use at most.", min=1)] = 128,
    window: Annotated[int, typer.Option(help="Tokens per calibration window.", min=2)] = 512,
    propagate: Annotated[
        str | None, typer.Option(help="quantized: correct layers for those before them (default with gptq); original.")
    ] = None,
    awq: Annotated[bool, typer.Option(help="Also scale input channels (AWQ); needs --calibration.")] = False,
    fisher: Annotated[
        bool, typer.Option(help="Also weigh outputs by what they change, from a backward pass; needs --calibration.")
    ] = False,
    share_codebooks: Annotated[bool, typer.Option(help="One pair of books for q/k/v, and for gate/up.")] = False,
    resume_dir: Annotated[
        Path | None, typer.Option(help="Keep finished blocks here; the same command goes on after an interruption.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep hidden states in files here, not in memory.")] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            help="Work from the files of a local model, with one block of it in memory, and resume from --out by "
            "itself. Default: if the model is larger than the free memory.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Quantise a causal language model and write it as a transformers checkpoint."""
    from torchao.quantization import quantize_
    from transformers import AutoTokenizer

    from aaac_ao import AAACConfig, calibrate_, calibrate_checkpoint
    from aaac_ao.calibrate import selected_layers
    from aaac_ao.evaluate import windows_of
    from aaac_ao.integrations.transformers import load_model, save_quantized

    config = AAACConfig(format=format, group_size=group_size, codebooks=codebooks, rounding=rounding)
    from_disk = _is_larger_than_memory(model) if low_memory is None else low_memory
    if not from_disk and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; choose another --out")
    texts = [path.read_text(encoding="utf-8") for path in calibration or []]
    options = {"propagate": propagate, "awq": awq, "share_codebooks": share_codebooks, "cache_dir": cache_dir}
    if from_disk and fisher:
        raise ValueError("--fisher needs the whole model in memory: leave out --low-memory, or give --no-low-memory")
    options |= {} if from_disk else {"resume_dir": resume_dir, "fisher": fisher}
    if not texts and any(options.values()):
        given = ", ".join(f"--{name.replace('_', '-')}" for name, value in options.items() if value)
        raise ValueError(f"{given} needs data: give --calibration FILE")
    if from_disk and not Path(model).is_dir():
        raise FileNotFoundError(f"--low-memory: {model} is not a local directory; download the model first")
    if from_disk and resume_dir is not None:
        raise ValueError("--resume-dir is not needed with --low-memory: the same command goes on from --out")
    _check_device(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = None
    if texts:
        ids = _token_ids(tokenizer, "\n\n".join(texts))
        batches = windows_of(ids, min(window, len(ids)), windows).split(8)
    if from_disk:
        quantised = calibrate_checkpoint(model, config, batches, out, device=device, tokenizer=tokenizer, **options)
    else:
        quantised = load_model(model).to(device)
        layers = selected_layers(quantised)
        if not layers:
            raise ValueError(f"{model} has no nn.Linear besides its output head (GPT-2's Conv1D is not supported)")
        if batches is not None:
            calibrate_(quantised, config, batches, **options)
        else:
            quantize_(quantised, config, lambda module, name: name in layers)
        save_quantized(quantised, config, out, tokenizer)
    typer.echo(f"wrote {out}: {_size_line(quantised)}")
    _explain_what_is_left(quantised, config)


def _is_larger_than_memory(model: str) -> bool:
    """Whether the files of a local model are larger than the free memory; says so if they are."""
    size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    free = _free_memory()
    if free is None or size <= free:
        return False
    typer.echo(
        f"{model} has {size / 1e9:.1f} GB of weights and {free / 1e9:.1f} GB of memory are free: working from its "
        "files, block by block (--no-low-memory loads it instead)",
        err=True,
    )
    return True


def _free_memory() -> int | None:
    """Bytes of main memory that can be had, within the limits of a container; None where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no limit
        return free


def _explain_what_is_left(model: torch.nn.Module, config: Any) -> None:
    """Say on stderr why a model is less quantised than a user may think."""
    small = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.in_features < config.group_size]
    if small:
        typer.echo(
            f"{len(small)} layers have fewer inputs than a group of {config.group_size} and stay as they were; "
            "a smaller --group-size includes them",
            err=True,
        )


def _check_device(device: str) -> None:
    """Refuse a device that does not exist before a model is loaded for it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from None


def _token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # longer than the model's window on purpose


def _size_line(model: torch.nn.Module) -> str:
    from aaac_ao import AAACTensor
    from aaac_ao.evaluate import linear_bits_per_weight

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    done = [module for module in linears if isinstance(module.weight, AAACTensor)]
    share = sum(module.weight.numel() for module in done) / sum(p.numel() for p in model.parameters())
    bits = linear_bits_per_weight(done)
    return f"{len(done)} of {len(linears)} linear layers at {bits:.3f} bits per weight, {share:.0%} of all parameters"


@app.command()
@_friendly
def evaluate(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext2: the test split that papers use.")] = None,
    reference: Annotated[str | None, typer.Option(help="Original model, for the KL divergence to it.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window, not overlapping.", min=2)] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use at most this many windows.", min=1)] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas: arc_easy,piqa.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task at most.", min=1)] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of tasks per forward pass.", min=1)] = 8,
    device: DeviceOption = "cpu",
) -> None:
    """Perplexity of a model on a text, its KL divergence to the original, and tasks of lm-eval."""
    from transformers import AutoTokenizer

    from aaac_ao.evaluate import evaluate as run
    from aaac_ao.evaluate import windows_of
    from aaac_ao.integrations.lm_eval import lm_eval_tasks
    from aaac_ao.integrations.transformers import load_model

    content = _evaluation_text(text, dataset)
    if content is None and tasks is None:
        raise ValueError("nothing to evaluate: give --text FILE, --dataset wikitext2 or --tasks NAMES")
    if content is None and reference is not None:
        raise ValueError("--reference needs a text to compare on: give --text FILE or --dataset wikitext2")
    _check_device(device)
    loaded = load_model(model).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if content is not None:
        original = None if reference is None else load_model(reference).to(device)
        window = min(window, loaded.config.max_position_embeddings)
        cut = windows_of(_token_ids(tokenizer, content), window, windows)
        result = run(loaded, cut, original, batch_size=1, progress=True)
        divergence = "" if result.kl is None else f", KL to reference {result.kl:.5f} nats/token"
        typer.echo(f"perplexity {result.perplexity:.4f}{divergence} on {result.tokens} tokens in windows of {window}")
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        for task, metrics in lm_eval_tasks(loaded, tokenizer, names, limit, batch_size, include_path).items():
            typer.echo(f"{task}: {_metrics_line(metrics)}")


def _metrics_line(metrics: dict[str, float]) -> str:
    """lm-eval's metrics of a task, each with its standard error where there is one."""
    errors = {key: f" ± {value:.4f}" for key, value in metrics.items() if "_stderr" in key}
    values = {key: value for key, value in metrics.items() if key not in errors}
    shown = {key: f"{value:.4f}{errors.get(key.replace(',', '_stderr,'), '')}" for key, value in values.items()}
    return ", ".join(f"{key.removesuffix(',none')} {value}" for key, value in shown.items())


def _evaluation_text(text: Path | None, dataset: str | None) -> str | None:
    """The text to evaluate on, from a file or a known data set."""
    from aaac_ao.evaluate import wikitext2_test

    if text is not None and dataset is not None:
        raise ValueError("--text and --dataset are two texts: give one of them")
    if dataset not in (None, "wikitext2"):
        raise ValueError(f"--dataset must be wikitext2, got {dataset!r}; for other data give --text FILE")
    if dataset is not None:
        return wikitext2_test()
    return None if text is None else text.read_text(encoding="utf-8")


@app.command()
@_friendly
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=2)] = 100,
    compile: Annotated[bool, typer.Option(help="Compile the decode step with torch.compile.")] = True,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a prompt greedily."""
    from transformers import AutoTokenizer

    from aaac_ao.generate import generate as run
    from aaac_ao.integrations.transformers import load_model

    _check_device(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = _token_ids(tokenizer, prompt)
    result = run(load_model(model).to(device), ids, new_tokens, compile)
    typer.echo(tokenizer.decode(result.ids, skip_special_tokens=True))
    typer.echo(f"{result.tokens_per_second:.1f} tokens/s after {result.compile_seconds:.1f} s of compilation", err=True)


if __name__ == "__main__":
    app()
