"""`moetrain`: reads a command line, runs the command, and ends with its exit code.

Exit codes: 0 done; 2 bad configuration or input; 75 a run that a signal stopped and that was saved,
128 and the signal's number where nothing is saved; 141 an answer that was not read to its end;
anything else is a failure. `moetrain.torchrun` exits with the code of its ranks, torchrun with 1
for all but 0.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

from moetrain import out_of_memory, settings
from moetrain.commands import Command, app, warn
from moetrain.errors import RunError, UserError
from moetrain.failure import BAD_INPUT, FAILED, is_watched, kind_of, record_error
from moetrain.redact import redact, show_traceback
from moetrain.saying import OutputError, forget, say, telling_output_errors

INTERRUPTED, UNREAD = 130, 141
"""As shells count an end by SIGINT, and by SIGPIPE."""
LINGER_S = 15.0
"""Longer than ranks started together need, one after the other, to reach the same error."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code; what the user can mend is one message."""
    return guarded(lambda: parse(sys.argv[1:] if args is None else args).run())


def guarded(work: Callable[[], int]) -> int:
    """Do the work of a command and return its exit code, or that of how it failed."""
    warnings.showwarning = _show_warning
    sys.excepthook = show_traceback
    try:
        with telling_output_errors():
            return work()
    except UserError as error:
        return _refuse(error, BAD_INPUT)
    except RunError as error:
        return _refuse(error, FAILED)
    except OutputError as error:
        return _unread(error)
    except Exception as error:
        return _fail(error)
    except KeyboardInterrupt:
        say("moetrain: interrupted; what a run last saved is there")
        return INTERRUPTED
    finally:
        forget(sys.stdout)
        forget(sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning in the words of whoever raised it, without the line of code that did."""
    warn([str(message)])


def parse(args: Sequence[str]) -> Command:
    """Read a command line; `UserError` where it is wrong, `SystemExit` after help."""
    settings.check_flag_names(args)
    with settings.one_message(args):
        return app.cli(
            prog="moetrain",
            description="Pretrain sparse-gated mixture-of-experts transformers.",
            args=args,
            registry=settings.REGISTRY,
        )


def _unread(error: OutputError) -> int:
    """What a command had to say could not be written."""
    why = RunError(f"standard output cannot be written: {error.strerror}")
    if error.errno != errno.EPIPE:
        return _refuse(why, FAILED)
    record_error(why)
    return UNREAD  # in silence: the reader has read enough, as `head` does


def _refuse(error: Exception, code: int) -> int:
    """Say it once for all ranks. `moetrain.torchrun` does so; without it rank 0 does at once, and
    the agent that watches them then ends the others while they linger. One that outlives that has
    an error of its own, and says it.
    """
    if record_error(error):
        return code
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(LINGER_S)
    message = f"moetrain: error: {f'rank {rank}: ' if rank else ''}{error}"
    say(redact(message))
    return code


def _fail(error: Exception) -> int:
    """Say why this rank fails, unless that is left to Python or, for what needs no traceback, to
    `moetrain.torchrun`, which repeats the first error of all."""
    rank = os.environ.get("RANK", "0")
    text = out_of_memory.explain(error)
    if text is not None:
        error = RunError(f"rank {rank}: {text}")
    is_left = record_error(error)
    if text is not None:
        if not is_left:
            say(redact(f"moetrain: error: {error}"))
        return FAILED
    if not is_watched():
        raise error
    if kind_of(error) == "consequence":
        text = f"lost another rank: {str(error).splitlines()[0]}"
    else:
        text = "".join(traceback.format_exception(error))
    say(redact(f"moetrain: rank {rank}: {text}"))
    return FAILED
