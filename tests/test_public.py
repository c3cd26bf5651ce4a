"""The public surface is documented and typed, the files are small, and the documents show what works."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "aaac_ao").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def public_definitions(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
                yield from methods


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_have_docstrings_and_annotations(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "module docstring"
    for node in public_definitions(path):
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue  # device functions: Triton takes no annotations of tensors
        assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{node.name} has no return annotation"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_public_name_is_in_the_readme():
    import aaac_ao

    readme = (ROOT / "README.md").read_text()
    missing = [name for name in aaac_ao.__all__ if name not in readme]
    assert not missing


def test_paths_named_in_the_documents_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        named = re.findall(r"`((?:aaac_ao|kernels|tests|benchmarks|examples|tools)/[\w./-]*)`", document.read_text())
        assert named
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_code_runs(tmp_path):
    """Every Python block of the README, in order, in one process, on a small random model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    setup = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, AutoModelForCausalLM\n"
        "def small(*args, **kwargs):\n"
        "    c = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2,\n"
        "                    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)\n"
        "    return LlamaForCausalLM(c).eval()\n"
        "small().save_pretrained('MODEL')\n"
        "real = AutoModelForCausalLM.from_pretrained\n"
        "AutoModelForCausalLM.from_pretrained = lambda name, **k: small() if name == 'MODEL' else real(name, **k)\n"
        "batches = [torch.randint(0, 97, (2, 16)) for _ in range(2)]\n"
    )
    script = tmp_path / "readme.py"
    script.write_text(setup + "\n".join(blocks))
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_import_initialises_no_device_and_no_other_library():
    code = (
        "import sys, torch; import aaac_ao; assert not torch.cuda.is_initialized(); "
        "assert 'transformers' not in sys.modules; assert 'aaac_ao.kernels' not in sys.modules; "
        "assert 'kernels' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
