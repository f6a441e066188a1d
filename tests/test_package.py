"""The package stands up however it is reached, and its kernels/ never hides the Hugging Face package `kernels`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.run import SUITES

ROOT = Path(__file__).parents[1]

# What transformers imports from the Hugging Face package when it believes that it is installed.
STAND_IN = """
class _Decorator:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Decorator
"""

LOOK = """
import importlib
from transformers.utils import is_kernels_available
from transformers import Qwen3ForCausalLM
try:
    kernels = importlib.import_module("kernels")
except ImportError:
    kernels = None
print(is_kernels_available(), getattr(kernels, "__file__", None))
"""


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Runs `python -c code` from `cwd`, which then comes first on the module search path; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hugging_face_kernels(tmp_path) -> Path:
    """A folder that holds an importable stand-in for the Hugging Face package `kernels`, with its metadata."""
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return tmp_path


def test_transformers_sees_the_hugging_face_kernels_from_the_repository_root(hugging_face_kernels):
    available, file = python(LOOK, hugging_face_kernels).split()
    assert available == "True"
    assert Path(file) == hugging_face_kernels / "kernels" / "__init__.py"


@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is not None and importlib.util.find_spec("kernels").origin is not None,
    reason="the Hugging Face package kernels is installed here",
)
def test_transformers_does_not_take_our_kernels_for_the_hugging_face_package():
    assert python(LOOK) == "False None"


def test_a_checkout_works_from_any_folder(tmp_path):
    code = "import thinksafe.kernels, thinksafe.launch; print(*thinksafe.kernels.__path__, *thinksafe.launch.__path__)"
    kernels, launch = python(code, ROOT, cwd=tmp_path).split()
    assert Path(kernels).resolve() == ROOT / "kernels"
    assert Path(launch).resolve() == ROOT / "launch"


def test_kernel_modules_exist_once():
    """A module imported under two names would hold two sets of compiled kernels and two dispatch tables."""
    for folder in ("kernels", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert f"import {folder}" not in text and f"from {folder}" not in text, file


def test_wheel_holds_code_recipes_templates_and_bundle(tmp_path):
    """Built without isolation, so that no test needs the network."""
    source = tmp_path / "source"
    for folder in ("thinksafe", "kernels", "launch", "csrc"):
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / file, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    python(code, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    assert ("thinksafe/libthinksafe.so" in names) == (shutil.which("nvcc") is not None)
    expected = [
        file
        for pattern in ("thinksafe/**/*.py", "thinksafe/organism/bundle/**/*", "thinksafe/reporting/*.*")
        for file in ROOT.glob(pattern)
    ]
    expected += [*ROOT.glob("kernels/*.py"), *ROOT.glob("launch/*"), *ROOT.glob("launch/recipes/*.yaml")]
    for file in expected:
        if not file.is_file() or "__pycache__" in file.parts:
            continue
        name = file.relative_to(ROOT).as_posix()
        assert (name if name.startswith("thinksafe/") else f"thinksafe/{name}") in names
    assert all(name.startswith("thinksafe") for name in names), "nothing lands at the top of site-packages"


def test_without_nvcc_the_package_installs_without_the_cuda_kernels(tmp_path):
    code = "import setuptools; setuptools.setup = lambda **keywords: print(keywords['ext_modules']); import setup"
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_cuda_that_does_not_compile_stops_the_installation_with_what_nvcc_says(tmp_path):
    """Going on would leave a GPU's owner with a slow sampler and no word of why."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'sampling.cu(1): error: no such thing'\nexit 2\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("nvcc could not compile csrc/:\nsampling.cu(1): error: no such thing")
    assert "Traceback" not in done.stderr


def test_what_a_gpu_machine_runs_needs_none_of_the_packages_it_lacks():
    """`make gpu` installs nothing, and the machine may have none of these."""
    lacking = ["pydantic", "datasets", "deepspeed", "flash_attn", "trl", "math_verify"]
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", file.read_text())]
    tests = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    modules = [*(f"benchmarks.{suite}" for suite in ("run", *SUITES)), *tests]
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import "
    subprocess.run([sys.executable, "-c", code + ", ".join(modules)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
