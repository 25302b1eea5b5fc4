"""Imports run one way: launch → pretrain → parallel → kernels → torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import farspan

ROOT = Path(farspan.__file__).resolve().parent
LAYERS = ("launch", "pretrain", "parallel", "kernels")  # each may import itself and what stands after it
# Packages from outside, beside the standard library.
THIRD_PARTY = {
    "kernels": {"torch", "ninja", "apex"},  # apex only where it is installed: nothing depends on it
    "parallel": {"torch"},
    "pretrain": {
        "torch",
        "numpy",
        "pydantic",
        "yaml",
        "safetensors",
        "xxhash",
        "tensorboard",
        "tokenizers",
        "datasets",
        "pyarrow",
        "transformers",
        "tqdm",
        "matplotlib",
    },
    "launch": {"torch", "packaging"},
}
# Those that one module knows: they are slow to import, or would change what was set before.
ONLY_IN = {"deepspeed": "farspan.parallel.zero", "megatron": "farspan.parallel.megatron"}
# Of the package, all that models know: layers and where they lie, operations, and what they are fed.
MODELS = "farspan.pretrain.models"
FOR_MODELS = (
    MODELS, "farspan.kernels", "farspan.parallel.feature_layers", "farspan.parallel.layers",
    "farspan.parallel.mappings", "farspan.parallel.mesh", "farspan.parallel.normalization",
    "farspan.parallel.sharding", "farspan.pretrain.batch",
)  # fmt: skip


# Programs: one uses the package from outside, as its reader would; one is run by an interpreter that has TensorFlow.
PROGRAMS = {"farspan.launch.quickstart", "farspan.pretrain.conversion.tensorflow_reader"}


def modules() -> dict[str, str]:
    """{dotted name: source} of the package."""
    found = {"farspan": (ROOT / "__init__.py").read_text(), "farspan.version": (ROOT / "version.py").read_text()}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("farspan", *(parts[:-1] if parts[-1] == "__init__" else parts)))
            if name not in PROGRAMS:
                found[name] = path.read_text(encoding="utf-8")
    return found


def imports(name: str, source: str, *, is_package: bool) -> Iterator[str]:
    """Every module, or name in a module, that a source imports, wherever in it; relative ones resolved."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            assert not node.level or base, f"{name} imports from beyond the package"
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...] | list[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(name: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module imports that it must not."""
    if name in ("farspan", "farspan.version"):
        return []  # the front door
    layer = name.split(".")[1]
    below = [f"farspan.{other}" for other in LAYERS[LAYERS.index(layer) :]] + ["farspan.version"]
    bad = []
    for module in imports(name, source, is_package=is_package):
        top = module.split(".")[0]
        if top == "farspan":
            allowed = within(module, FOR_MODELS if within(name, (MODELS,)) else below) and module not in PROGRAMS
        elif top in ONLY_IN:
            allowed = name == ONLY_IN[top]
        else:
            allowed = top in sys.stdlib_module_names or top in THIRD_PARTY[layer]
        if not allowed:
            bad.append(f"{name} imports {module}")
    return bad


def test_imports_run_one_way() -> None:
    bad = []
    for name, source in modules().items():
        is_package = (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file()
        bad += violations(name, source, is_package=is_package)
    assert bad == []


def test_inside_the_package_imports_are_relative() -> None:
    for name, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert not [n for n in names if within(n, ["farspan", *LAYERS])], f"{name}: {names}"


@pytest.mark.parametrize(
    ("name", "source", "bad"),
    [
        ("farspan.kernels.ema", "import torch, math\nfrom torch import Tensor\nfrom .build import compiled", None),
        ("farspan.kernels.ema", "import numpy", "numpy"),
        ("farspan.kernels.ema", "def f():\n    from ..parallel.mesh import Mesh", "farspan.parallel.mesh.Mesh"),
        ("farspan.kernels.ema", "from .. import parallel", "farspan.parallel"),
        ("farspan.parallel.new", "from ..kernels import dropout\nfrom .megatron import parallel_state", None),
        ("farspan.parallel.new", "def f():\n    import megatron.core as m", "megatron.core"),
        ("farspan.parallel.megatron", "import megatron.core", None),
        ("farspan.parallel.new", "from ..pretrain.batch import Batch", "farspan.pretrain.batch.Batch"),
        ("farspan.parallel.new", "import deepspeed.comm", "deepspeed.comm"),
        ("farspan.parallel.zero", "import deepspeed", None),
        ("farspan.parallel.new", "from transformers import AutoModel", "transformers.AutoModel"),
        ("farspan.pretrain.new", "from ..parallel.engine import Engine\nfrom ..version import __version__", None),
        ("farspan.pretrain.new", "from ..launch import cli", "farspan.launch.cli"),
        ("farspan.pretrain.new", "from ..launch.cli import main", "farspan.launch.cli.main"),
        ("farspan.pretrain.new", "from deepspeed import comm", "deepspeed.comm"),
        ("farspan.pretrain.new", "import megatron", "megatron"),
        ("farspan.pretrain.data.new", "from ...launch import local", "farspan.launch.local"),
        ("farspan.pretrain.models.mega", "from ..batch import Batch\nfrom ...parallel.layers import LayerNorm", None),
        ("farspan.pretrain.models.mega", "from .base import LanguageModel\nfrom . import heads", None),
        ("farspan.pretrain.models.mega", "from ...parallel.engine import Engine", "farspan.parallel.engine.Engine"),
        ("farspan.pretrain.models.mega", "from ...parallel import engine", "farspan.parallel.engine"),
        ("farspan.pretrain.models.mega", "from ..objectives import A", "farspan.pretrain.objectives.A"),
        ("farspan.pretrain.models.mega", "from .. import train", "farspan.pretrain.train"),
        ("farspan.launch.new", "from ..pretrain.train import train\nfrom ..version import __version__", None),
        ("farspan.launch.new", "import kernels.dropout", "kernels.dropout"),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees(name: str, source: str, bad: str | None) -> None:
    assert violations(name, source) == ([] if bad is None else [f"{name} imports {bad}"])


def test_relative_imports_of_a_package() -> None:
    assert list(imports("farspan.pretrain.models", "from .base import A", is_package=True)) == [f"{MODELS}.base.A"]
    assert violations("farspan.pretrain.models", "from ..train import train", is_package=True)


def test_importing_farspan_is_light() -> None:
    slow = ("torch", "numpy", "deepspeed", "megatron", "transformers", "pydantic", "datasets")
    code = f"import sys, farspan; print(*(name for name in {slow} if name in sys.modules)); farspan.__version__"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="module 'farspan' has no attribute 'laod'"):
        _ = farspan.laod
