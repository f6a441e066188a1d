"""Command that compiles csrc/ into thinksafe/libthinksafe.so: `python csrc/build.py`. setup.py calls `build`."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "sampling.cu"]
LIBRARY_PATH = ROOT / "thinksafe" / "libthinksafe.so"
# Machine code for the A100 and for the H100 and H200. Newer GPUs compile the PTX when the library is loaded.
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80")


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None if it is not on PATH."""
    return shutil.which("nvcc")


def build(library_path: Path, *options: str) -> str:
    """Compile csrc/ into a shared library and return the compiler's output. nvcc must be on PATH.

    Args:
        library_path: file to write; an older one is replaced only after a successful compilation.
        options: further options of nvcc.

    Raises:
        subprocess.CalledProcessError: nvcc failed; the error's `stdout` holds the compiler's output.
    """
    partial_path = library_path.with_suffix(f".{library_path.suffix[1:]}.partial")
    command = [find_nvcc(), "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", *options]
    command += [flag for target in TARGETS for flag in ("-gencode", target)]
    command += [*map(str, SOURCES), "-o", str(partial_path)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    partial_path.replace(library_path)
    return process.stdout


if __name__ == "__main__":
    if find_nvcc() is None:
        sys.exit("csrc/build.py: no nvcc on PATH; install the CUDA toolkit, or continue without it: torch then samples")
    try:
        print(build(LIBRARY_PATH), end="")
    except subprocess.CalledProcessError as error:
        sys.exit(error.stdout)
    print(LIBRARY_PATH)
