"""The CUDA C++ kernels of csrc/: one library with a plain C interface, made by csrc/build.py where there is nvcc."""

import ctypes
import warnings
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import thinksafe

LIBRARY = Path(thinksafe.__file__).with_name("libthinksafe.so")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where the package was installed without nvcc."""
    if not LIBRARY.exists():
        warnings.warn(
            "csrc/ is not compiled, so sampling on this GPU runs in plain torch; with nvcc on PATH run "
            "`python csrc/build.py` in the repository, or install again",
            stacklevel=2,
        )
        return None
    return declare(ctypes.CDLL(str(LIBRARY)))


def declare(handle: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures."""
    handle.thinksafe_sample_workspace.restype = c_int64
    handle.thinksafe_sample_workspace.argtypes = (c_int64, c_int64)
    handle.thinksafe_sample.restype = c_int
    handle.thinksafe_sample.argtypes = (c_void_p, c_int64, c_int64, c_int64, *(c_void_p,) * 9)
    return handle
