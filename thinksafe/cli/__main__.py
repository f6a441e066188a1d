"""The command line's entry point. It turns an expected error into one line; parser.py holds the options."""

import sys

try:
    import argparse
    import errno
    import os
    import re
    from collections.abc import Sequence
    from contextlib import redirect_stderr, redirect_stdout

    from thinksafe.cli import commands
    from thinksafe.cli.parser import _parser
    from thinksafe.errors import UserError, is_out_of_memory
except KeyboardInterrupt:  # before `main` could answer for it
    sys.exit(130)

_MEMORY_SETTINGS = "sampler.kv_cache_gib, sampler.max_running or training.max_tokens_per_pack"
_USERS_TO_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for the user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a store that is gone would be told of in stack traces
    status = _answer(arguments)
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from thinksafe.distributed.workers import end

        end(status)
    return status


def _answer(arguments: Sequence[str] | None) -> int:
    options = None
    try:
        with commands.leaving_at_once():
            options = _parsed(arguments)
        options.command(options)
        return 0
    except UserError as error:
        print(f"thinksafe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        why = str(interrupt) or "interrupted"
        print(f"\nthinksafe: {why}; nothing finished is lost, the same command goes on from here", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"thinksafe: out of memory: {str(error).splitlines()[0]}; lower {_MEMORY_SETTINGS}", file=sys.stderr)
        return 2
    except _disk_errors() as error:
        said = re.search(r"os error (\d+)", str(error))
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number not in _USERS_TO_MEND:
            raise
        where = getattr(error, "filename", None) or getattr(options, "out", None)  # a write does not tell its file
        place = f" ({where})" if where else ""
        print(f"thinksafe: {os.strerror(number)}{place}; mend that and give the same command again", file=sys.stderr)
        return 2


def _disk_errors() -> tuple[type[Exception], ...]:
    """safetensors tells of a full disk by an error of its own; asked for only once something has gone wrong."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of several workers, which are all given the same, one explains and complains."""
    if os.environ.get("RANK", "0") == "0":
        return _parser().parse_args(arguments)
    with open(os.devnull, "w") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        return _parser().parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
