"""Compile csrc/ into thinksafe/libthinksafe.so: `python csrc/build.py`. setup.py does the same on installation."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "sampling.cu"]
LIBRARY = ROOT / "thinksafe" / "libthinksafe.so"
# Machine code for the A100 and the H100 or H200; anything newer compiles the PTX when the library is loaded.
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80")


def nvcc() -> str | None:
    """The CUDA compiler on PATH, if any."""
    return shutil.which("nvcc")


def build(library: Path, *options: str) -> str:
    """Compile the library; what the compiler printed.

    Raises:
        subprocess.CalledProcessError: nvcc refused; its `stdout` says why.
    """
    partial = library.with_suffix(f".{library.suffix[1:]}.partial")
    command = [nvcc(), "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", *options]
    command += [word for target in TARGETS for word in ("-gencode", target)]
    command += [*map(str, SOURCES), "-o", str(partial)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    partial.replace(library)
    return done.stdout


if __name__ == "__main__":
    if nvcc() is None:
        sys.exit("csrc/build.py: no nvcc on PATH; install the CUDA toolkit, or go on without: torch samples then")
    try:
        print(build(LIBRARY), end="")
    except subprocess.CalledProcessError as error:
        sys.exit(error.stdout)
    print(LIBRARY)
