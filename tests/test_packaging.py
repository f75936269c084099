"""The folders' links, a wheel built through them, and Hugging Face's `kernels` beside our own folder."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("drafters", "verifiers", "kernels", "certificates", "serving", "configs", "experiments", "heads")
PIP = (sys.executable, "-m", "pip")
OFFLINE = ("--no-deps", "--no-index")

# A `kernels` package with whatever transformers takes from it: decorators that change nothing, and mocks.
STAND_IN = """
from unittest.mock import MagicMock

def use_kernel_forward_from_hub(layer_name):
    return lambda layer: layer

def use_kernelized_func(*functions):
    return lambda layer: layer

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""

# The order of a real installation: the working directory first, site-packages after it.
BESIDE_STAND_IN = """
import importlib, json, pkgutil, site, sys
assert sys.path[0] == ""
site.addsitedir(sys.argv[1])
kernels = importlib.import_module("kernels")
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import is_kernels_available
import specdec.kernels
names = [f"specdec.kernels.{op.name}" for op in pkgutil.iter_modules(specdec.kernels.__path__)]
print(json.dumps({
    "kernels": kernels.__file__,
    "available": is_kernels_available(),
    "ops": [importlib.import_module(name).__file__ for name in names],
}))
"""

FROM_WHEEL = """
import importlib, json, sys
files = {name: importlib.import_module(name).__file__ for name in sys.argv[1].split(",")}
print(json.dumps({"files": files, "configs": list(importlib.import_module("specdec.configs").__path__)}))
"""


def _run(*command: object, cwd: Path, **env: str) -> str:
    python_path = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {key: value for key, value in os.environ.items() if key not in python_path}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _required_kernels_version() -> str:
    """The oldest `kernels` that the installed transformers takes, read without importing transformers."""
    spec = importlib.util.find_spec("transformers")
    source = Path(spec.origin).with_name("utils") / "import_utils.py"
    return re.search(r'^KERNELS_MIN_VERSION = "(.+)"', source.read_text(), re.MULTILINE).group(1)


def _wheel_contents() -> list[str]:
    """What of the working tree belongs in a wheel, by its path there."""
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    yamls = (ROOT / "configs").rglob("*.yaml")
    cpp = [path for end in ("h", "cpp") for path in (ROOT / "kernels").rglob(f"*.{end}")]
    heads = [path for end in ("safetensors", "json", "md") for path in (ROOT / "heads").rglob(f"*.{end}")]
    inside = [Path("specdec") / path.relative_to(ROOT) for path in (*modules, *yamls, *cpp, *heads)]
    core = [path.relative_to(ROOT) for place in ("*.py", "config/*.py") for path in (ROOT / "specdec").glob(place)]
    return sorted(path.as_posix() for path in (*inside, *core))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources: the working tree gets no build folder, and lends none."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("specdec", *FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for file in ROOT.iterdir():
        if file.name == "pyproject.toml" or file.name.startswith(("LICENSE", "README")):
            shutil.copy(file, source)
    (source / "experiments" / "results").mkdir(exist_ok=True)
    (source / "experiments" / "results" / "rows.jsonl").write_text("{}\n")
    _run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", dist, source, cwd=source)
    return next(dist.glob("specdec-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed in."""
    site = tmp_path_factory.mktemp("installed") / "site"
    _run(*PIP, "install", *OFFLINE, "--target", site, wheel, cwd=wheel.parent)
    return site


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_linked(folder):
    link = ROOT / "specdec" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.is_dir()


def test_only_kernels_is_a_namespace_folder():
    """As a namespace folder it never wins over an installed package of that name."""
    code = [folder for folder in FOLDERS if any((ROOT / folder).rglob("*.py"))]
    assert [folder for folder in code if not (ROOT / folder / "__init__.py").exists()] == ["kernels"]


def test_installed_kernels_package_wins(tmp_path):
    package, metadata = tmp_path / "kernels", tmp_path / "kernels.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    metadata.mkdir()
    version = _required_kernels_version()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")

    seen = json.loads(_run(sys.executable, "-c", BESIDE_STAND_IN, tmp_path, cwd=ROOT))

    assert seen["kernels"] == str(package / "__init__.py")
    assert seen["available"]
    assert seen["ops"]
    assert all(Path(file).resolve().is_relative_to(ROOT / "kernels") for file in seen["ops"])


def test_wheel_holds_real_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = sorted(name for name in names if ".dist-info/" not in name)
    assert packed == _wheel_contents()


def test_wheel_installs_real_files_and_the_command(installed):
    assert not [path for path in installed.rglob("*") if path.is_symlink()]
    assert (installed / "bin" / "specdec").exists()


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_wheel_is_imported_from_where_it_is_installed(installed, tmp_path, place):
    probe = tmp_path / "probe.py"
    probe.write_text(FROM_WHEEL)
    ops = [f"kernels.{path.parent.name}" for path in (ROOT / "kernels").glob("*/__init__.py")]
    modules = [
        f"specdec.{name}"
        for name in ("drafters", "verifiers", "certificates", "serving", "configs", "experiments", *ops)
    ]

    cwd = ROOT if place == "repository" else tmp_path
    command = (sys.executable, probe, ",".join(["specdec", *modules]))
    seen = json.loads(_run(*command, cwd=cwd, PYTHONPATH=str(installed)))

    assert all(Path(file).is_relative_to(installed) for file in seen["files"].values())
    assert seen["configs"] == [str(installed / "specdec" / "configs")]
