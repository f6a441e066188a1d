"""A stage shows its progress as a bar on a terminal, and as one line without a terminal, never both."""

import fcntl
import os
import pty
import struct
import termios
from contextlib import redirect_stderr

from thinksafe.run.progress import TokenBar


def run_stage():
    with TokenBar("generate", 2, "responses") as bar:
        bar.update(0)
        bar.update(0)


def resume_stage():
    """Resume a training that was killed after step 998 of 1,000."""
    with TokenBar("train", 1000, "steps") as bar:
        bar.update(0, item_number=999)
        bar.update(0, item_number=1000)


def _read(terminal: int) -> bytes:
    """Return a part of the output, or no bytes once all is read and the other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def show_on_terminal(stage) -> str:
    """Return the output of stage() on a terminal of 64 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 64, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, redirect_stderr(terminal):
        stage()
    output = b"".join(iter(lambda: _read(master), b"")).decode()
    os.close(master)
    return output


def test_terminal_shows_only_a_bar_that_fits():
    output = show_on_terminal(run_stage)
    assert output.count("\n") == 1, output
    *_, last = output.rstrip().split("\r")
    assert "generate: 100%|" in last and " 2/2 " in last and "tok/s" in last and len(last) <= 64


def test_bar_includes_items_of_an_earlier_process():
    *_, last = show_on_terminal(resume_stage).rstrip().split("\r")
    assert "train: 100%|" in last and "1000/1000" in last and "tok/s" in last


def test_one_line_is_printed_without_a_terminal(capsys):
    run_stage()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{'generate':>30}:      2 responses in") and line.endswith("tok/s")


def test_line_counts_items_of_this_process(capsys):
    resume_stage()
    assert "train: 2 of 1000 steps in" in capsys.readouterr().err
