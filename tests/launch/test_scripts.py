"""The scripts in launch/ start real workers with real torchrun on a CPU. Small programs stand in for ssh and SLURM."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.organism_runs import run_arguments
from thinksafe import __version__
from thinksafe.cli.__main__ import main

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def script(tmp_path):
    """Return script(name, *arguments, **variables), which runs it with tmp_path/bin first on the path."""

    def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment_bin = Path(sys.executable).parent  # the folder of torchrun
        path = os.pathsep.join([str(tmp_path / "bin"), str(environment_bin), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        command = ["bash", str(ROOT / "launch" / name), *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    return run


def write_program(program: Path, body: str) -> None:
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)


def free_port() -> str:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        return str(unused.getsockname()[1])


def test_every_script_is_executable_bash_and_documented():
    for file in SCRIPTS:
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert os.access(file, os.X_OK) and f"launch/{file.name}" in (ROOT / "launch/README.md").read_text()
    assert [file.name for file in SCRIPTS] == ["hosts.sh", "node.sh", "slurm.sh"]


@pytest.mark.slow
def test_node_and_slurm_scripts_start_one_worker_for_each_gpu(script, tmp_path):
    result = script("node.sh", "--version", GPUS="2")
    assert result.returncode == 0 and result.stdout.splitlines() == [f"thinksafe {__version__}"], result.stderr
    # The second host name comes after the script has read the first one and closed the pipe.
    print_hosts = "echo localhost; sleep 0.5; echo node2"
    write_program(tmp_path / "bin/scontrol", f'[ "$*" = "show hostnames node[1-2]" ] && {{ {print_hosts}; }}')
    write_program(tmp_path / "bin/srun", 'echo "srun $1" >&2; shift; exec "$@"')
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    result = script("slurm.sh", "--version", GPUS="2", MASTER_PORT=free_port(), **job)
    assert result.returncode == 0 and result.stdout.splitlines() == [f"thinksafe {__version__}"], result.stderr
    assert "srun --kill-on-bad-exit=1" in result.stderr


@pytest.mark.slow
def test_hosts_script_runs_all_machines_of_the_hostfile(script, tmp_path):
    """Both lines of the hostfile name this machine; each gets its own torchrun."""
    arguments = run_arguments(tmp_path / "sets it's", num_prompts=12, num_evaluated=2)
    write_program(tmp_path / "bin/ssh", 'echo "ssh $1" >&2; exec bash -c "$2"')
    (tmp_path / "hostfile").write_text("# two workers\nlocalhost slots=1\n\nlocalhost slots=1  # the same machine\n")
    out = tmp_path / "by two"
    result = script("hosts.sh", tmp_path / "hostfile", "generate", *arguments, "--out", out, MASTER_PORT=free_port())
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("ssh localhost") == 2 and result.stdout.strip() == str(out / "responses.jsonl")
    assert main(["generate", *arguments, "--out", str(tmp_path / "by one")]) == 0
    assert (out / "responses.jsonl").read_bytes() == (tmp_path / "by one/responses.jsonl").read_bytes()
    (tmp_path / "hostfile").write_text("# no host\n")
    result = script("hosts.sh", tmp_path / "hostfile", "generate")
    assert result.returncode == 2 and "names no host" in result.stderr
    (tmp_path / "hostfile").write_text("localhost slots=1\nother\n")
    result = script("hosts.sh", tmp_path / "hostfile", "generate")
    assert result.returncode == 2 and result.stderr.endswith("hostfile: other: needs slots=GPUS after the name\n")


@pytest.mark.parametrize("arguments", [[], ["nofile", "run"]])
def test_unreadable_hostfile_gives_a_one_line_error(script, arguments):
    result = script("hosts.sh", *arguments)
    hostfile = arguments[0] if arguments else "HOSTFILE"
    assert result.returncode == 2
    assert result.stderr == f"launch/hosts.sh HOSTFILE COMMAND ...: {hostfile} is not a readable file\n"
