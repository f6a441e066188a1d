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
def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL | None:
    """Return the library of compiled kernels, loaded once per process.

    If the file does not exist, because the package was installed without nvcc, warn once and return None.

    Raises:
        OSError: the file exists but cannot be loaded.
    """
    if not path.exists():
        warnings.warn(
            "csrc/ is not compiled, so sampling on this GPU runs in plain torch. To compile it, put nvcc on PATH and "
            "run `python csrc/build.py` in the repository, or install the package again",
            stacklevel=2,
        )
        return None
    library = ctypes.CDLL(str(path))
    library.thinksafe_sample_workspace.restype = c_int64
    library.thinksafe_sample_workspace.argtypes = (c_int64, c_int64)
    library.thinksafe_sample.restype = c_int
    library.thinksafe_sample.argtypes = (c_void_p, c_int64, c_int64, c_int64, *(c_void_p,) * 9)
    return library
