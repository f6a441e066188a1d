"""The CUDA C++ kernels of csrc/: one shared library with a C interface, which csrc/build.py compiles with nvcc."""

import ctypes
import warnings
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import thinksafe

LIBRARY_PATH = Path(thinksafe.__file__).with_name("libthinksafe.so")
"""Where csrc/build.py writes the compiled library."""


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library of compiled kernels, loaded once per process.

    If the file LIBRARY_PATH does not exist, because the package was installed without nvcc, warn once and return None.

    Raises:
        OSError: the file exists but cannot be loaded.
    """
    if not LIBRARY_PATH.exists():
        warnings.warn(
            "csrc/ is not compiled, so sampling on this GPU runs in plain torch. To compile it, put nvcc on PATH and "
            "run `python csrc/build.py` in the repository, or install the package again",
            stacklevel=2,
        )
        return None
    return declare_signatures(ctypes.CDLL(str(LIBRARY_PATH)))


def declare_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C types of the arguments and results of the library's functions in place; return the library."""
    library.thinksafe_sample_workspace.restype = c_int64
    library.thinksafe_sample_workspace.argtypes = (c_int64, c_int64)
    library.thinksafe_sample.restype = c_int
    library.thinksafe_sample.argtypes = (c_void_p, c_int64, c_int64, c_int64, *(c_void_p,) * 9)
    return library
