"""How ThinkSafe is packaged; the tested versions stand in constraints.txt, the tools' settings in pyproject.toml.

`kernels/` and `launch/` lie at the top of the repository, where a reader looks for them, and are imported as
`thinksafe.kernels` and `thinksafe.launch` through two links, `thinksafe/kernels` and `thinksafe/launch`. With links
one layout serves a checkout (`PYTHONPATH=.`), an editable install and a wheel, which holds the files themselves; a
`package_dir` entry would serve only the wheel and the editable install. The two folders have no `__init__.py`, on
purpose: transformers imports the Hugging Face package `kernels`, and where Python starts at the repository root a
folder `kernels/` with an `__init__.py` would be found in its place and break `import transformers`. Without that file
the folder can only be a namespace portion, which any installed `kernels` outranks wherever it stands on the path, and
which transformers does not mistake for an installation. tests/test_package.py holds both.

`csrc/` is compiled where there is nvcc and left out where there is none: plain torch then does the same, slower.
"""

import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as csrc  # noqa: E402

VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "thinksafe/__init__.py").read_text(), re.MULTILINE)[1]


class BuildWithNvcc(build_ext):
    """csrc/ as one plain library, which Python loads with ctypes: it depends on no version of torch or Python."""

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            csrc.build(library)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"nvcc could not compile csrc/:\n{error.stdout}") from None

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"


TRITON = "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'"
DEEPSPEED = "deepspeed>=0.19.8"
TENSORBOARD = "tensorboard"
PEERS = ["peft", "trl"]

setup(
    name="thinksafe",
    version=VERSION,
    description="Restores the safety of reasoning models with their own data, on one GPU.",
    python_requires=">=3.11",
    # find_packages sees regular packages only, so the two folders without __init__.py are named.
    packages=[*find_packages(include=["thinksafe", "thinksafe.*"]), "thinksafe.kernels", "thinksafe.launch"],
    package_data={
        "thinksafe.export": ["*.jinja"],
        "thinksafe.launch": ["recipes/*.yaml", "*.sh", "hostfile", "README.md"],
        "thinksafe.organism": ["bundle/**"],
        "thinksafe.reporting": ["*.html", "*.css", "*.js"],
    },
    ext_modules=[Extension("thinksafe.libthinksafe", [])] if csrc.nvcc() else [],
    cmdclass={"build_ext": BuildWithNvcc},
    entry_points={"console_scripts": ["thinksafe = thinksafe.cli.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors",
        "tokenizers",
        "numpy",
        "datasets",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "jinja2",
        "tqdm",
        "matplotlib",
        "math-verify",
    ],
    extras_require={
        "gpu": [TRITON],
        "deepspeed": [DEEPSPEED],
        "tensorboard": [TENSORBOARD],
        "wandb": ["wandb"],
        "bench": PEERS,
        "test": [
            TRITON,
            DEEPSPEED,
            TENSORBOARD,
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            *PEERS,
            "ruff",
            "selenium",
            "setuptools",
        ],
    },
)
