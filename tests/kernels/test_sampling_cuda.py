"""csrc/sampling.cu samples the tokens that plain torch samples: compiled for a CPU by cuda_on_cpu.h, and on a GPU.

Where nvcc is installed, it compiles the kernels without spills.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.sampling import row_settings
from thinksafe.kernels.cuda_library import load_library
from thinksafe.kernels.sampling import sample, sample_with_library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "sampling.cu"
BARRIER = "__syncthreads();"
CHUNK = 1024
pytestmark = pytest.mark.slow  # the tests compile the kernel
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def cpu_library(tmp_path_factory) -> ctypes.CDLL:
    """The kernel compiled for the CPU with tests/emulation/cuda_on_cpu.h."""
    library = tmp_path_factory.mktemp("csrc") / "sampling.so"
    compile_for_cpu(SOURCE, library)
    return load_library(library)


def compile_for_cpu(source: Path, library: Path) -> None:
    command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
    command += ["-include", ROOT / "tests/emulation/cuda_on_cpu.h", source, "-o", library]
    subprocess.run(command, check=True)


def sample_both_ways(library, logits, **sampling):
    """Return (tokens, logprobs) of the kernel and of plain torch."""
    arguments = row_settings(logits, **sampling)
    return sample_with_library(library, logits, tuple(arguments)), sample(logits, *arguments)


def assert_equal(library, logits, **sampling) -> torch.Tensor:
    """Assert equal tokens and log-probabilities; return the kernel's tokens.

    Rounding of exp and log may decide an exponential race that is almost a tie, so one token in 200, or a single token,
    may differ.
    """
    (tokens, logprobs), (expected_tokens, expected_logprobs) = sample_both_ways(library, logits, **sampling)
    is_same = tokens == expected_tokens
    assert (~is_same).sum() <= max(1, len(tokens) // 200), (tokens[~is_same], expected_tokens[~is_same])
    torch.testing.assert_close(logprobs[is_same], expected_logprobs[is_same], atol=2e-5, rtol=1e-5, equal_nan=True)
    return tokens


KINDS = {
    "flat": lambda noise: noise * 0.1,
    "peaked": lambda noise: noise * 6,
    "ties": lambda noise: (noise * 2).bfloat16().float(),
    "zeros of both signs": lambda noise: noise.clamp(max=0.0) * torch.where(noise > 1, -1.0, 1.0),
    "all equal": lambda noise: noise * 0 - 3.0,
    "half masked": lambda noise: noise.masked_fill(noise > 0, -torch.inf),
    "one token": lambda noise: noise.masked_fill(noise < noise.amax(-1, keepdim=True), -torch.inf),
    "far apart": lambda noise: noise * 1e4,
}
SETTINGS = {
    "greedy": {"temperature": 0.0, "top_k": 20, "top_p": 0.95},
    "Qwen3": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "R1-Distill": {"temperature": 0.6, "top_p": 0.95},
    "plain": {},
    "hot": {"temperature": 5.0, "top_p": 0.9},
    "narrow": {"top_p": 1e-6},
    "top-k above the chunks": {"top_k": 300},
    "top-k above the candidates": {"top_k": 2500, "top_p": 0.99},
}


@needs_compiler
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_samples_what_torch_samples(cpu_library, fresh_seed, kind, setting):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = KINDS[kind](torch.randn(6, 5 * CHUNK + 77, generator=generator))
    assert_equal(cpu_library, logits, **SETTINGS[setting], seed=fresh_seed, position=torch.arange(6))


@needs_compiler
def test_logprob_of_large_logits_is_precise(cpu_library):
    logits = torch.tensor([[36074.69, 36064.64, 0.0, -3e4]])
    expected = logits.double().log_softmax(-1)[0, 0].float()
    for _, logprob in sample_both_ways(cpu_library, logits, temperature=0.0):
        torch.testing.assert_close(logprob[0], expected, atol=0, rtol=1e-4)


@needs_compiler
@given(data=st.data(), vocab_size=st.sampled_from([1, 2, 31, 1023, 1024, 1025, 2048, 3000]))
@settings(max_examples=60, deadline=None)
def test_rows_may_have_different_settings(cpu_library, data, vocab_size):
    rows = 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # Rows are views: their stride exceeds their length.
    logits = torch.randn(rows, vocab_size + 3, generator=generator)[:, :vocab_size]
    logits = logits * data.draw(st.sampled_from([0.01, 1.0, 8.0, 100.0]))

    def draw_per_row(values) -> torch.Tensor:
        return torch.tensor([data.draw(st.sampled_from(values)) for _ in range(rows)])

    assert_equal(
        cpu_library,
        logits,
        temperature=draw_per_row([0.0, 0.3, 0.6, 1.0, 3.0]),
        top_k=draw_per_row([0, 1, 2, 20, vocab_size - 1 or 1, vocab_size, 5000]),
        top_p=draw_per_row([1e-6, 0.3, 0.95, 0.9999999, 1.0]),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        position=torch.randint(0, 40_000, (rows,), generator=generator),
    )


@needs_compiler
def test_non_finite_rows_are_flagged_at_any_position(cpu_library):
    logits = torch.randn(9, 3 * CHUNK, generator=torch.Generator().manual_seed(1))
    logits[1, 2000] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 7] = torch.nan
    logits[5, 3071] = torch.inf
    logits[6] = -torch.inf
    logits[6, 3000] = 2.0
    for sampling in SETTINGS.values():
        tokens = assert_equal(cpu_library, logits, **sampling, seed=3)
        assert (tokens == -1).tolist() == [False, True, True, True, True, True, False, False, False]
        assert tokens[6] == 3000


CUTS = [
    {"temperature": 5.0, "top_k": 5},
    {"temperature": 3.0, "top_p": 0.3},
    {"temperature": 5.0, "top_k": 300, "top_p": 0.2},
    {"temperature": 5.0, "top_k": 2500, "top_p": 0.3},
]
"""Settings with which a wrong cutoff changes the token: a likely winner of the race is far outside the nucleus."""


def differs_between_orders_of_threads(library: ctypes.CDLL, seed: int) -> bool:
    """Return whether seeds that shuffle the order in which threads run change the bits of a result."""
    logits, results = torch.randn(4, 4 * CHUNK, generator=torch.Generator().manual_seed(seed)) * 2, []
    for shuffle_seed in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_ON_CPU_SEED", str(shuffle_seed))
            for settings in CUTS:
                arguments = tuple(row_settings(logits, **settings, seed=seed, position=torch.arange(4)))
                results.append(sample_with_library(library, logits, arguments))
    return any(
        not torch.equal(tensor, expected)
        for result, expected_result in zip(results[len(CUTS) :], results[: len(CUTS)] * 4, strict=True)
        for tensor, expected in zip(result, expected_result, strict=True)
    )


@needs_compiler
def test_result_does_not_depend_on_the_order_of_threads(cpu_library, fresh_seed):
    assert not differs_between_orders_of_threads(cpu_library, fresh_seed)


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(SOURCE.read_text().count(BARRIER)))
def test_kernel_without_one_of_its_barriers_depends_on_the_order_of_threads(tmp_path, index):
    """Otherwise a thread waits forever, or the kernel reads outside its memory: the process ends with a signal."""
    before, after = SOURCE.read_text().split(BARRIER)[: index + 1], SOURCE.read_text().split(BARRIER)[index + 1 :]
    source, library = tmp_path / "sampling.cu", tmp_path / "sampling.so"
    source.write_text(BARRIER.join(before) + BARRIER.join(after))
    compile_for_cpu(source, library)
    call = f"differs_between_orders_of_threads(load_library(Path({str(library)!r})), seed=1)"
    command = [sys.executable, "-c", f"from {__name__} import *; print({call})"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode < 0 or process.stdout == "True\n", process.stderr


@needs_compiler
def test_empty_batch_gives_no_tokens(cpu_library):
    (tokens, logprobs), _ = sample_both_ways(cpu_library, torch.zeros(0, 50))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_kernels_without_spills(tmp_path):
    """For every target of csrc/build.py no register is spilled, and four blocks fit on an SM."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import build
    finally:
        sys.path.pop(0)
    library = tmp_path / "libthinksafe.so"
    report = build.build(library, "-Xptxas", "-v")
    compiled = set(
        re.findall(r"Compiling entry function .*?(chunk_stats_kernel|sample_kernel).*? for '(sm_\w+)'", report)
    )
    assert compiled == {
        (kernel, target) for kernel in ("chunk_stats_kernel", "sample_kernel") for target in ("sm_80", "sm_90a")
    }
    assert set(re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {("0", "0")}
    # Four blocks of 256 threads share the 65,536 registers of an SM and, on an A100, its 164 KB of shared memory. They
    # are half the threads that an SM can hold: enough, since most loads hit shared memory.
    assert all(int(count) <= 64 for count in re.findall(r"Used (\d+) registers", report))
    assert all(int(count) <= 40_000 for count in re.findall(r"(\d+) bytes smem", report))
    load_library(library)  # it loads without a CUDA driver and has every function


def test_build_without_nvcc_names_the_missing_compiler(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "build.py")]
    process = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.strip().startswith("csrc/build.py: no nvcc on PATH")
    assert "Traceback" not in process.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [40, 5 * CHUNK + 77, 151_936])
@pytest.mark.parametrize("setting", SETTINGS)
def test_samples_on_gpu_match_samples_on_cpu(fresh_seed, setting, vocab_size):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = torch.randn(64, vocab_size, generator=generator) * 3
    logits[5, 17] = torch.nan
    settings = {**SETTINGS[setting], "seed": fresh_seed}
    expected, expected_logprobs = sample(logits, *row_settings(logits, **settings, position=torch.arange(64)))
    gpu_logits = logits.cuda()
    arguments = row_settings(gpu_logits, **settings, position=torch.arange(64, device="cuda"))
    tokens, logprobs = sample(gpu_logits, *arguments)
    repeated, _ = sample(gpu_logits, *arguments)
    assert torch.equal(tokens, repeated)
    is_same = tokens.cpu() == expected
    assert (~is_same).sum() <= 2  # rounding of exp and log may decide a race that is almost a tie
    torch.testing.assert_close(
        logprobs.cpu()[is_same], expected_logprobs[is_same], atol=1e-4, rtol=1e-5, equal_nan=True
    )
    assert tokens[5] == -1


@pytest.mark.gpu
def test_sampling_can_be_captured_in_a_cuda_graph(fresh_seed):
    """The capture works without a host sync, and a replay reads the current positions."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(fresh_seed)).cuda()
    arguments = row_settings(
        logits, top_p=0.95, seed=fresh_seed, position=torch.zeros(8, dtype=torch.int64, device="cuda")
    )
    sample(logits, *arguments)
    graph = torch.cuda.CUDAGraph()
    arguments = [argument.contiguous() for argument in arguments]
    with torch.cuda.graph(graph):
        tokens, _ = sample(logits, *arguments)
    for position in range(5):
        arguments[-1].fill_(position)
        graph.replay()
        assert torch.equal(tokens, sample(logits, *arguments)[0])
