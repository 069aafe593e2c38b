"""From a command line to a step that runs, and how a wrong input or an error ends it. Imports no torch."""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from errors import UserError, reader_may_leave, without_secrets
from training.utils.flags.parse import is_main_process, parse
from training.utils.run import heartbeat
from training.utils.run.ranks import adopt_ranks, number

Args = TypeVar("Args")


def parse_or_exit(
    args_class: type[Args], argv: Sequence[str] | None = None, check: Callable[[Args], None] = lambda args: None
) -> Args:
    """Return the flags of a step. A UserError becomes one line on stderr and exit code 2.

    check: further checks, which raise UserError. A step's main.py calls this above its imports of torch: --help, a wrong
    flag and a wrong path are answered in less than a second.
    """
    with errors_told(), reader_may_leave():
        adopt_ranks()
        args = parse(args_class, argv)
        if getattr(args, "resume", "") is None and number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0):
            args.resume = "auto"  # torchrun --max-restarts starts the same command again
        check(args)
    gc.disable()  # until run_main: the imports between make objects that stay, and looking through them took 1.2 of 12 s
    return args


def run_main(main: Callable[[Any], None], args: Any) -> None:
    """Run a step with its flags. A UserError becomes one line on stderr and exit code 2."""
    gc.freeze()  # what is imported is never looked through again
    gc.enable()
    with errors_told():
        main(args)


@contextmanager
def errors_told() -> Iterator[None]:
    """Tell the other nodes of an error that ends this process; say a UserError in one line and exit with its code."""
    try:
        yield
    except UserError as error:
        heartbeat.failed(error.code, str(error))
        if not is_main_process():
            # Usually all processes fail alike: the main one speaks, and the launcher ends this one while it waits.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5 if os.environ.get("LOCAL_RANK") == "0" else 10)
        print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        if is_main_process():
            print("Stopped by Ctrl-C; --resume continues from the newest checkpoint, if there is one.", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        # With gloo, the loss of another node shows in the main thread too, as an error of a socket.
        heartbeat.failed(1, f"{type(error).__name__}: {error}", patience=5.0)
        raise
