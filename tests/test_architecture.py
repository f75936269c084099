"""The arrows between the folders run one way, and nothing uses the folders' bare names."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("drafters", "verifiers", "kernels", "certificates", "serving", "configs", "experiments")

HYDRA = ("hydra", "omegaconf")
ROOMS = ("specdec.drafters", "specdec.verifiers")
# The server, and the packages that only it needs.
SERVER = ("specdec.serving", "fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client")

# What the files below each prefix must not import. The first prefix that fits a file decides.
EDGE = ("specdec.cli", "specdec.experiments")
FORBIDDEN = {
    EDGE: (),
    ("specdec.certificates",): ("specdec.experiments", *SERVER, *HYDRA),
    ("specdec.config",): (*ROOMS, "specdec.certificates", "specdec.experiments", *SERVER),
    ("specdec.drafters",): ("specdec.verifiers", "specdec.certificates", "specdec.experiments", *SERVER, *HYDRA),
    ("specdec.verifiers",): ("specdec.drafters", "specdec.certificates", "specdec.experiments", *SERVER, *HYDRA),
    ("specdec.serving",): (*ROOMS, "specdec.certificates", "specdec.experiments", *HYDRA),
    ("specdec",): (*ROOMS, "specdec.certificates", "specdec.experiments", *SERVER, *HYDRA),
}
DYNAMIC_IMPORTS = ("import_module", "__import__", "importorskip")
KERNELS_MAY_IMPORT = ("torch", "triton", "specdec.kernels", *sys.stdlib_module_names)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in ("specdec", "tests") else ("specdec", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _library_files() -> list[Path]:
    folders = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([*(ROOT / "specdec").glob("*.py"), *(ROOT / "specdec" / "config").glob("*.py"), *folders])


def _imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yields the absolute dotted name of everything that `source` imports."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in DYNAMIC_IMPORTS:
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def _is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `module` that break a rule."""
    names = list(_imports(source, module, is_package))
    bare = [name for name in names if _is_below(name, FOLDERS)]
    if not _is_below(module, ("specdec",)):
        return bare
    if _is_below(module, ("specdec.kernels",)):
        return [name for name in names if not _is_below(name, KERNELS_MAY_IMPORT)]
    forbidden = next(rule for prefixes, rule in FORBIDDEN.items() if _is_below(module, prefixes))
    return bare + [name for name in names if _is_below(name, forbidden)]


def test_arrows_run_one_way():
    found = {}
    for path in [*_library_files(), *(ROOT / "tests").rglob("*.py")]:
        if names := _violations(path.read_text(), _module_name(path), path.name == "__init__.py"):
            found[str(path.relative_to(ROOT))] = names
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.engine", "from specdec.drafters import ngram"),
        ("specdec.engine", "from specdec import verifiers"),
        ("specdec.engine", "def run():\n    from .experiments.generate import main"),
        ("specdec.engine", "import omegaconf"),
        ("specdec.async_engine", "from specdec.serving import app"),
        ("specdec.async_engine", "import fastapi"),
        ("specdec.serving.app", "from specdec.drafters import NGramDrafter"),
        ("specdec.serving.app", "from specdec.experiments.building import build"),
        ("specdec.config", "import specdec.drafters.ngram"),
        ("specdec.config.runs", "import specdec.drafters.ngram"),
        ("specdec.drafters.ngram", "from hydra.utils import instantiate"),
        ("specdec.drafters.training.loop", "from ...verifiers import RULES"),
        ("specdec.verifiers.follow", "from ..drafters import ngram"),
        ("specdec.verifiers.follow", "from specdec.certificates import oracle"),
        ("specdec.certificates.oracle", "import hydra"),
        ("specdec.kernels.tree_attention.api", "from specdec.tree import TokenTree"),
        ("specdec.kernels.tree_attention.api", "import numpy"),
        ("specdec.experiments.generate", "from kernels import tree_attention"),
        ("specdec.cli", "import importlib\nimportlib.import_module('experiments.generate')"),
        ("tests.test_tree", "import drafters.ngram"),
    ],
)
def test_a_wrong_import_is_caught(module, source):
    assert len(_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.model", "from specdec.kernels.tree_attention import api"),
        ("specdec.config", "from omegaconf import DictConfig"),
        ("specdec.cli", "import hydra\nimport specdec.experiments"),
        ("specdec.serving.app", "from fastapi import FastAPI\nfrom specdec.async_engine import AsyncEngine"),
        ("specdec.drafters.ngram", "from specdec.tree import TokenTree\nfrom . import growth"),
        ("specdec.kernels.tree_attention.api", "import math\nimport torch\nfrom . import reference, triton"),
        ("specdec.experiments.generate", "from specdec.drafters import ngram\nimport hydra"),
    ],
)
def test_a_right_import_is_allowed(module, source):
    assert not _violations(source, module)


def test_configs_name_targets_by_import_name():
    bare = re.compile(rf"_target_:\s*[\"']?({'|'.join(FOLDERS)})\.")
    assert not [path for path in (ROOT / "configs").rglob("*.yaml") if bare.search(path.read_text())]
