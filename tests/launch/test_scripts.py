"""The scripts in launch/ start what they say: real torchrun and real workers on a CPU, with ssh and SLURM played."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.test_pipeline import ROOT, settings
from thinksafe import __version__
from thinksafe.cli.__main__ import main

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def script(tmp_path):
    """script(name, *arguments, **variables): run it, with programs of ours before all others on the path."""

    def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        here = Path(sys.executable).parent  # torchrun lies beside it, wherever the tests are started from
        path = os.pathsep.join([str(tmp_path / "bin"), str(here), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        command = ["bash", str(ROOT / "launch" / name), *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    return run


def play(program: Path, body: str) -> None:
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def test_every_script_is_bash_and_explained():
    for file in SCRIPTS:
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert os.access(file, os.X_OK) and f"launch/{file.name}" in (ROOT / "launch/README.md").read_text()
    assert [file.name for file in SCRIPTS] == ["hosts.sh", "node.sh", "slurm.sh"]


@pytest.mark.slow
def test_one_machine_and_a_slurm_job_start_a_worker_for_each_gpu(script, tmp_path):
    done = script("node.sh", "--version", GPUS="2")
    assert done.returncode == 0 and done.stdout.splitlines() == [f"thinksafe {__version__}"], done.stderr
    # The second machine is told when the script has long read the first: nobody listens any more.
    names = "echo localhost; sleep 0.5; echo there"
    play(tmp_path / "bin/scontrol", f'[ "$*" = "show hostnames here,there" ] && {{ {names}; }}')
    play(tmp_path / "bin/srun", 'echo "srun $1" >&2; shift; exec "$@"')
    job = {"SLURM_JOB_NODELIST": "here,there", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    done = script("slurm.sh", "--version", GPUS="2", MASTER_PORT=free_port(), **job)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"thinksafe {__version__}"], done.stderr
    assert "srun --kill-on-bad-exit=1" in done.stderr


@pytest.mark.slow
def test_machines_of_a_hostfile_work_on_one_run(script, tmp_path):
    """Two that are both this one, each with a torchrun of its own."""
    arguments = settings(tmp_path / "sets it's", prompts=12, evaluated=2)
    play(tmp_path / "bin/ssh", 'echo "ssh $1" >&2; exec bash -c "$2"')
    (tmp_path / "hostfile").write_text("# ours\nlocalhost slots=1\n\nlocalhost slots=1  # twice\n")
    out = tmp_path / "by two"
    done = script("hosts.sh", tmp_path / "hostfile", "generate", *arguments, "--out", out, MASTER_PORT=free_port())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ssh localhost") == 2 and done.stdout.strip() == str(out / "responses.jsonl")
    assert main(["generate", *arguments, "--out", str(tmp_path / "by one")]) == 0
    assert (out / "responses.jsonl").read_bytes() == (tmp_path / "by one/responses.jsonl").read_bytes()
    (tmp_path / "hostfile").write_text("# nobody\n")
    done = script("hosts.sh", tmp_path / "hostfile", "generate")
    assert done.returncode == 2 and "names no host" in done.stderr
    (tmp_path / "hostfile").write_text("localhost slots=1\nother\n")
    done = script("hosts.sh", tmp_path / "hostfile", "generate")
    assert done.returncode == 2 and done.stderr.endswith("hostfile: other: needs slots=GPUS behind the name\n")


@pytest.mark.parametrize("given", [[], ["nofile", "run"]])
def test_a_hostfile_that_cannot_be_read_is_one_line(script, given):
    done = script("hosts.sh", *given)
    named = given[0] if given else "HOSTFILE"
    assert done.returncode == 2
    assert done.stderr == f"launch/hosts.sh HOSTFILE COMMAND ...: {named} is no file that can be read\n"
