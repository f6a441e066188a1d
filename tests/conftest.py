"""What test files share: the gpu marker, one thread, no network, seeds that are new on every run, a crowded sampler."""

import os

# Before anything imports Hugging Face code: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads of several workers on two cores spin for each other: ten times slower. Subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# A busy machine is no bug: examples have no deadline, whole tests a time-out.
hypothesis.settings.register_profile("thinksafe", deadline=None)
hypothesis.settings.load_profile("thinksafe")
pytest.register_assert_rewrite("tests.support.tiny_guards", "tests.support.training_runs", "tests.support.judged_run")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SEED_VARIABLE = "THINKSAFE_TEST_SEED"


def pytest_ignore_collect(collection_path, config):
    """Under `-m gpu` a file without a GPU test is not even imported: `make gpu` installs nothing, and its python may
    lack what only other tests need."""
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
    """A seed below 2**31 that no run has used before; printed when the test fails, repeated by THINKSAFE_TEST_SEED."""
    chosen = os.environ.get(SEED_VARIABLE)
    seed = int(chosen) if chosen else int.from_bytes(os.urandom(4), "little") >> 1
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
def crowded(monkeypatch):
    """Admit on the prompt alone, so that a small pool runs out and sequences are preempted."""
    monkeypatch.setattr("thinksafe.sampler.scheduler._GROWTH_TOKENS", 1)
