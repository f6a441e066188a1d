"""What a person sees while a stage works: a bar on a terminal, one line elsewhere, never both."""

import fcntl
import os
import pty
import struct
import termios
from contextlib import redirect_stderr

from thinksafe.run.progress import TokenBar


def work():
    with TokenBar("generate", 2, "responses") as bar:
        bar.update(0)
        bar.update(0)


def go_on():
    """A training that was killed after step 998 of 1,000."""
    with TokenBar("train", 1000, "steps") as bar:
        bar.update(0, place=999)
        bar.update(0, place=1000)


def _read(terminal: int) -> bytes:
    """Some of what was written; nothing once all is read, since nobody holds the other end any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def on_a_terminal(work) -> str:
    """What is seen on one of 64 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 64, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, redirect_stderr(terminal):
        work()
    shown = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    return shown


def test_a_terminal_shows_a_bar_that_fits_and_no_line_after_it():
    shown = on_a_terminal(work)
    assert shown.count("\n") == 1, shown
    *_, last = shown.rstrip().split("\r")
    assert "generate: 100%|" in last and " 2/2 " in last and "tok/s" in last and len(last) <= 64


def test_what_was_done_before_is_part_of_the_bar():
    *_, last = on_a_terminal(go_on).rstrip().split("\r")
    assert "train: 100%|" in last and "1000/1000" in last and "tok/s" in last


def test_where_there_is_no_terminal_a_line_says_what_was_done(capsys):
    work()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{'generate':>30}:      2 responses in") and line.endswith("tok/s")


def test_the_line_counts_what_was_done_now(capsys):
    go_on()
    assert "train: 2 of 1000 steps in" in capsys.readouterr().err
