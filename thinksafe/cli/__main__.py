"""Entry point of the command line: it runs a command and prints an expected error as one line.

parser.py holds the options, commands.py the commands. Help, version and usage errors need the standard library alone.
"""

import sys

try:
    import argparse
    import errno
    import os
    import re
    from collections.abc import Sequence
    from contextlib import redirect_stderr, redirect_stdout
    from pathlib import Path

    from thinksafe.cli import commands
    from thinksafe.cli.parser import build_parser
    from thinksafe.errors import UserError, is_out_of_memory
except KeyboardInterrupt:  # during an import, before `main` can catch it
    sys.exit(130)

# Recipe keys that an out-of-memory message names.
_MEMORY_SETTINGS = "sampler.kv_cache_gib, sampler.max_num_seqs or training.max_tokens_per_pack"
# Errors of the operating system that mean an unwritable disk or folder.
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0; 2 for a mistake of the user or the machine; 130 after Ctrl-C.

    With several workers, a status other than 0 ends this process at once instead. A defect keeps its traceback.

    Args:
        arguments: words after the program's name; None for the words of this process.

    Raises:
        SystemExit: --help or --version (status 0), or a usage error (status 2).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise a lost store is logged with stack traces
    status = _run_command(arguments)
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from thinksafe.distributed.liveness import exit_now

        exit_now(status)
    return status


def _run_command(arguments: Sequence[str] | None) -> int:
    """Run one command, print an expected error as one line to stderr, and return the exit status; see `main`."""
    options = argparse.Namespace()
    try:
        with commands.exit_on_interrupt():
            options = parse_arguments(arguments)
        options.command(options)
        return 0
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "interrupted"
        message = f"{reason}; no finished work is lost, run the same command again to continue"
        print(f"\nthinksafe: {message}", file=sys.stderr)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else _machine_problem(error, getattr(options, "out", None))
        if message is None:
            raise
        print(f"thinksafe: {message}", file=sys.stderr)
        return 2


def _machine_problem(error: Exception, out: Path | None) -> str | None:
    """Return a message if host or GPU memory or the disk is full, or a file is not writable; None for any other error.

    Args:
        out: value of the option --out. The message names it if the error has no path.
    """
    number = _system_errno(error)
    if is_out_of_memory(error) or number == errno.ENOMEM:
        first_line = str(error).partition("\n")[0] or "the host has no memory left"
        return f"out of memory: {first_line}; lower {_MEMORY_SETTINGS}"
    if number not in _DISK_ERRNOS:
        return None
    path = getattr(error, "filename", None) or out  # the error of a failed write names no file
    location = f" ({path})" if path else ""
    return f"{os.strerror(number)}{location}; fix this and run the same command again"


def _system_errno(error: Exception) -> int | None:
    """Return the errno of an OSError, or of an error of safetensors, whose message has it; None if there is none."""
    safetensors = sys.modules.get("safetensors")  # not imported here: an unused library raises no error
    if not isinstance(error, (OSError, safetensors.SafetensorError) if safetensors else OSError):
        return None
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed options, or raise SystemExit as `main` does. All workers have the same arguments, so only the
    leader prints help and usage errors."""
    if os.environ.get("RANK", "0") == "0":
        return build_parser().parse_args(arguments)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return build_parser().parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
