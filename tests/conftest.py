"""Fixtures and settings of all tests: the gpu marker, one thread, no network, a new random seed on every run."""

import os

# No test may use the network. This must be set before the first import of Hugging Face code.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# The threads of several workers on two cores would spin while they wait, which is ten times slower. Subprocesses
# inherit this setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# A busy machine is not a bug: single examples have no deadline, only whole tests have a timeout.
hypothesis.settings.register_profile("thinksafe", deadline=None)
hypothesis.settings.load_profile("thinksafe")
pytest.register_assert_rewrite("tests.support.tiny_guards", "tests.support.training_runs", "tests.support.judged_run")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SEED_VARIABLE = "THINKSAFE_TEST_SEED"


def pytest_ignore_collect(collection_path, config):
    """Ignore files without a GPU test under `-m gpu`: `make gpu` installs nothing, and its Python may lack the packages
    that only other tests import."""
    if config.option.markexpr == "gpu" and collection_path.name.startswith("test_"):
        return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None
    return None


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def fresh_seed(request) -> int:
    """A new random seed below 2**31, printed when the test fails. THINKSAFE_TEST_SEED repeats a seed."""
    repeated_seed = os.environ.get(SEED_VARIABLE)
    seed = int(repeated_seed) if repeated_seed else int.from_bytes(os.urandom(4), "little") >> 1
    request.node.user_properties.append((SEED_VARIABLE, seed))
    torch.manual_seed(seed)
    return seed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    seed = dict(item.user_properties).get(SEED_VARIABLE)
    if seed is not None and report.failed:
        report.sections.append(("fresh seed", f"repeat with {SEED_VARIABLE}={seed}"))
    return report


@pytest.fixture
def overcommit(monkeypatch):
    """Admit a request if only its prompt fits, so that a small pool runs out and sequences are preempted."""
    monkeypatch.setattr("thinksafe.sampler.scheduler._GROWTH_TOKENS", 1)
