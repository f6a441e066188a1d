"""The package works in a checkout and as a wheel, and never hides the Hugging Face package `kernels`."""

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

# Stand-in for the Hugging Face package: everything that transformers imports from it.
HUGGING_FACE_KERNELS = """
class _Decorator:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Decorator
"""

FIND_KERNELS = """
import importlib
from transformers.utils import is_kernels_available
from transformers import Qwen3ForCausalLM
try:
    kernels = importlib.import_module("kernels")
except ImportError:
    kernels = None
print(is_kernels_available(), getattr(kernels, "__file__", None))
"""


def run_python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Run `python -c code` in `cwd`, which comes first on the module search path; return its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": ""}
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture
def hugging_face_kernels(tmp_path) -> Path:
    """Return a folder with a stand-in for the Hugging Face package `kernels` and its metadata."""
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(HUGGING_FACE_KERNELS)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return tmp_path


@pytest.mark.slow
def test_transformers_finds_the_hugging_face_kernels(hugging_face_kernels):
    available, file = run_python(FIND_KERNELS, hugging_face_kernels).split()
    assert available == "True"
    assert Path(file) == hugging_face_kernels / "kernels" / "__init__.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is not None and importlib.util.find_spec("kernels").origin is not None,
    reason="the Hugging Face package kernels is installed here",
)
def test_transformers_ignores_our_kernels():
    assert run_python(FIND_KERNELS) == "False None"


def test_checkout_works_from_any_folder(tmp_path):
    code = "import thinksafe.kernels, thinksafe.launch; print(*thinksafe.kernels.__path__, *thinksafe.launch.__path__)"
    kernels, launch = run_python(code, ROOT, cwd=tmp_path).split()
    assert Path(kernels).resolve() == ROOT / "kernels"
    assert Path(launch).resolve() == ROOT / "launch"


def test_kernels_are_imported_under_one_name():
    """A module imported under two names would hold two sets of compiled kernels and two dispatch tables."""
    for folder in ("kernels", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert f"import {folder}" not in text and f"from {folder}" not in text, file


@pytest.mark.slow
def test_wheel_holds_code_recipes_templates_and_bundle(tmp_path):
    """The build runs without isolation, so that the test needs no network."""
    source = tmp_path / "source"
    for folder in ("thinksafe", "kernels", "launch", "csrc"):
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    run_python(code, cwd=source)
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
    assert all(name.startswith("thinksafe") for name in names), "the wheel installs only `thinksafe`"


def test_package_installs_without_nvcc(tmp_path):
    code = "import setuptools; setuptools.setup = lambda **keywords: print(keywords['ext_modules']); import setup"
    environment = {**os.environ, "PATH": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr


def test_error_of_nvcc_stops_the_installation(tmp_path):
    """Otherwise the installation would lack the compiled sampling, and be slow on a GPU without a message."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'sampling.cu(1): error: no such thing'\nexit 2\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode != 0
    assert process.stderr.strip().endswith("nvcc could not compile csrc/:\nsampling.cu(1): error: no such thing")
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_stages_and_kernels_need_no_triton():
    """`make run` installs none on a machine without a GPU."""
    kernels = [f"thinksafe.kernels.{file.stem}" for file in sorted(ROOT.glob("kernels/*.py"))]
    code = f"import sys; sys.modules['triton'] = None; import thinksafe.pipeline, {', '.join(kernels)}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and len(kernels) > 15, process.stderr


@pytest.mark.slow
def test_gpu_tests_and_benchmarks_need_few_packages():
    """`make gpu` installs nothing, and a GPU machine may lack these packages."""
    missing_packages = ["pydantic", "datasets", "deepspeed", "flash_attn", "trl", "math_verify"]
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", file.read_text())]
    tests = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    modules = [*(f"benchmarks.{suite}" for suite in ("run", *SUITES)), *tests]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing_packages})); import "
    subprocess.run([sys.executable, "-c", code + ", ".join(modules)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
