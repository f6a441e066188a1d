"""csrc/sampling.cu: the kernel's own source run on a CPU against the plain torch form, and what nvcc makes of it."""

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

from tests.kernels.test_sampling import columns
from thinksafe.kernels.native import declare
from thinksafe.kernels.sampling import sample, sample_with

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 1024
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> ctypes.CDLL:
    """The kernel compiled for the CPU by tests/emulation/cuda_on_cpu.h."""
    library = tmp_path_factory.mktemp("csrc") / "sampling.so"
    command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
    command += ["-include", ROOT / "tests/emulation/cuda_on_cpu.h", ROOT / "csrc" / "sampling.cu", "-o", library]
    subprocess.run(command, check=True)
    return declare(ctypes.CDLL(str(library)))


def both(handle, logits, **chosen):
    """(kernel, torch), each (tokens, logprobs). Outputs of the kernel are never what was there before."""
    arguments = columns(logits, **chosen)
    return sample_with(handle, logits, tuple(arguments)), sample(logits, *arguments)


def assert_equal(handle, logits, **chosen) -> torch.Tensor:
    """Same tokens and log-probabilities; a race may turn where exp and log round differently, so one in 200 may."""
    (tokens, logprobs), (expected, expected_logprobs) = both(handle, logits, **chosen)
    same = tokens == expected
    assert (~same).sum() <= max(1, len(tokens) // 200), (tokens[~same], expected[~same])
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=2e-5, rtol=1e-5, equal_nan=True)
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
def test_the_kernel_draws_what_torch_draws(on_cpu, fresh_seed, kind, setting):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = KINDS[kind](torch.randn(6, 5 * CHUNK + 77, generator=generator))
    assert_equal(on_cpu, logits, **SETTINGS[setting], seed=fresh_seed, position=torch.arange(6))


@needs_compiler
def test_large_logits_keep_what_the_others_take_from_them(on_cpu):
    logits = torch.tensor([[36074.69, 36064.64, 0.0, -3e4]])
    expected = logits.double().log_softmax(-1)[0, 0].float()
    for _, logprob in both(on_cpu, logits, temperature=0.0):
        torch.testing.assert_close(logprob[0], expected, atol=0, rtol=1e-4)


@needs_compiler
@given(data=st.data(), vocab_size=st.sampled_from([1, 2, 31, 1023, 1024, 1025, 2048, 3000]))
@settings(max_examples=60, deadline=None)
def test_rows_with_their_own_settings(on_cpu, data, vocab_size):
    rows = 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab_size + 3, generator=generator)[:, :vocab_size]  # rows further apart than wide
    logits = logits * data.draw(st.sampled_from([0.01, 1.0, 8.0, 100.0]))

    def each(values) -> torch.Tensor:
        return torch.tensor([data.draw(st.sampled_from(values)) for _ in range(rows)])

    assert_equal(
        on_cpu,
        logits,
        temperature=each([0.0, 0.3, 0.6, 1.0, 3.0]),
        top_k=each([0, 1, 2, 20, vocab_size - 1 or 1, vocab_size, 5000]),
        top_p=each([1e-6, 0.3, 0.95, 0.9999999, 1.0]),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        position=torch.randint(0, 40_000, (rows,), generator=generator),
    )


@needs_compiler
def test_broken_rows_are_flagged_wherever_they_broke(on_cpu):
    logits = torch.randn(9, 3 * CHUNK, generator=torch.Generator().manual_seed(1))
    logits[1, 2000] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 7] = torch.nan
    logits[5, 3071] = torch.inf
    logits[6] = -torch.inf
    logits[6, 3000] = 2.0
    for chosen in SETTINGS.values():
        tokens = assert_equal(on_cpu, logits, **chosen, seed=3)
        assert (tokens == -1).tolist() == [False, True, True, True, True, True, False, False, False]
        assert tokens[6] == 3000


@needs_compiler
@pytest.mark.parametrize("setting", ["Qwen3", "R1-Distill", "hot", "top-k above the candidates"])
def test_no_barrier_is_missing(on_cpu, fresh_seed, monkeypatch, setting):
    """The threads' turns are shuffled by a seed: same bits in every order. Integer sums do not depend on it either."""
    logits = torch.randn(4, 4 * CHUNK, generator=torch.Generator().manual_seed(fresh_seed)) * 2
    arguments = tuple(columns(logits, **SETTINGS[setting], seed=fresh_seed, position=torch.arange(4)))
    results = []
    for order in range(5):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(order))
        results.append(sample_with(on_cpu, logits, arguments))
    for tokens, logprobs in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(logprobs, results[0][1])


@needs_compiler
def test_an_empty_batch_starts_nothing(on_cpu):
    (tokens, logprobs), _ = both(on_cpu, torch.zeros(0, 50))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_it_without_spills(tmp_path):
    """For every target of csrc/build.py: no spilled register, and as many blocks a multiprocessor as planned."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import build
    finally:
        sys.path.pop(0)
    library = tmp_path / "libthinksafe.so"
    report = build.build(library, "-Xptxas", "-v")
    compiled = set(re.findall(r"Compiling entry function .*?(measure|draw).*? for '(sm_\w+)'", report))
    assert compiled == {(kernel, target) for kernel in ("measure", "draw") for target in ("sm_80", "sm_90a")}
    assert set(re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {("0", "0")}
    # Four blocks of 256 threads share 65,536 registers and, on an A100, 164 KB: half its threads, enough for loads
    # that mostly hit shared memory.
    assert all(int(count) <= 64 for count in re.findall(r"Used (\d+) registers", report))
    assert all(int(count) <= 40_000 for count in re.findall(r"(\d+) bytes smem", report))
    declare(ctypes.CDLL(str(library)))  # it loads, and has what Python calls, also where there is no driver


def test_a_build_without_nvcc_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "build.py")]
    done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("csrc/build.py: no nvcc on PATH")
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [40, 5 * CHUNK + 77, 151_936])
@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_on_a_gpu_equal_those_on_a_cpu(fresh_seed, setting, vocab_size):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = torch.randn(64, vocab_size, generator=generator) * 3
    logits[5, 17] = torch.nan
    settings = {**SETTINGS[setting], "seed": fresh_seed}
    expected, expected_logprobs = sample(logits, *columns(logits, **settings, position=torch.arange(64)))
    on_gpu = logits.cuda()
    arguments = columns(on_gpu, **settings, position=torch.arange(64, device="cuda"))
    tokens, logprobs = sample(on_gpu, *arguments)
    again, _ = sample(on_gpu, *arguments)
    assert torch.equal(tokens, again)
    same = tokens.cpu() == expected
    assert (~same).sum() <= 2  # exp and log differ in the last bit, which may turn a race that is almost a tie
    torch.testing.assert_close(logprobs.cpu()[same], expected_logprobs[same], atol=1e-4, rtol=1e-5, equal_nan=True)
    assert tokens[5] == -1


@pytest.mark.gpu
def test_drawing_can_be_captured_in_a_cuda_graph(fresh_seed):
    """Nothing waits for the host, and the positions are read when the graph runs."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(fresh_seed)).cuda()
    arguments = columns(logits, top_p=0.95, seed=fresh_seed, position=torch.zeros(8, dtype=torch.int64, device="cuda"))
    sample(logits, *arguments)
    graph = torch.cuda.CUDAGraph()
    arguments = [argument.contiguous() for argument in arguments]
    with torch.cuda.graph(graph):
        tokens, _ = sample(logits, *arguments)
    for position in range(5):
        arguments[-1].fill_(position)
        graph.replay()
        assert torch.equal(tokens, sample(logits, *arguments)[0])
