"""The package's build. constraints.txt lists the tested versions, pyproject.toml the settings of the tools.

`kernels/` and `launch/` are at the top of the repository, where readers look for them. Two symbolic links,
`thinksafe/kernels` and `thinksafe/launch`, make them importable as `thinksafe.kernels` and `thinksafe.launch`. The
links work in a checkout (`PYTHONPATH=.`), in an editable install and in a wheel, which contains the files themselves; a
`package_dir` entry would not work in a checkout.

The two folders must not have an `__init__.py`. transformers imports the Hugging Face package `kernels`. If Python
starts at the root of the repository, a folder `kernels/` with an `__init__.py` would be imported instead and break
`import transformers`. Without that file the folder is at most a part of a namespace package: any installed `kernels`
takes precedence, and transformers does not regard the folder as an installation. tests/test_package.py tests both.

`csrc/` is compiled if nvcc is installed. Without it, plain torch does the same, more slowly.
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
    """A build of csrc/ into one plain library for ctypes, which depends on no version of torch or Python.

    setuptools runs it if nvcc is installed. If nvcc fails, the installation ends with the compiler's output.
    """

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
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The ThinkSafe maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["safety", "alignment", "reasoning", "language models", "LoRA", "sampling", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # find_packages finds only packages with an __init__.py, so the two other folders are named.
    packages=[*find_packages(include=["thinksafe", "thinksafe.*"]), "thinksafe.kernels", "thinksafe.launch"],
    package_data={
        "thinksafe.export": ["*.jinja"],
        "thinksafe.launch": ["methods/*.yaml", "recipes/*.yaml", "*.sh", "hostfile", "README.md"],
        "thinksafe.organism": ["bundle/**"],
        "thinksafe.reporting": ["*.html", "*.css", "*.js"],
    },
    ext_modules=[Extension("thinksafe.libthinksafe", [])] if csrc.find_nvcc() else [],
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
