"""`python -m megarl.launcher`: torch's own launcher with a quieter, more truthful end.

torchrun turns every exit code of a rank into 1 and adds a page of its own to the message the failing rank has printed. Here the exit code
of the first rank that failed is passed on (2, 65, 78: a user's mistake, already explained in one line by that rank; 75: the ranks stopped
because they were asked to, see `operations.drain`, and this process then leaves SIGTERM to them), and a rank that could not
explain itself, because a signal ended it, is named in one line. A monitor beside the ranks (`operations.watchdog`) finds those that hang.
Arguments are torchrun's.
"""

import argparse
import logging
import signal
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megarl.errors import ConfigError, error_kinds
from megarl.operations import drain, outcome
from megarl.operations.watching import watched

EXPLAINED = {kind.exit_code for kind in error_kinds().values()} | {outcome.EXIT_CODES["drained"]}


def main(arguments: list[str] | None = None) -> int:
    """Start the ranks of this node, wait for them and return the exit code of the first failure, 0 without one."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with watched():
            torchrun.run(_parse(arguments))
    except ConfigError as error:
        for fault in error.faults:
            print(f"megarl: error: {fault}", file=sys.stderr)
        return error.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"megarl: rank {rank} (pid {failure.pid}) was ended by {name}", file=sys.stderr)
            outcome.record_signal(rank, name)
            return 128 - failure.exitcode
        if failure.exitcode not in EXPLAINED:
            print(f"megarl: rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}: see its message", file=sys.stderr)
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """torchrun's arguments. Ranks that can be asked to stop get SIGTERM themselves, and are not ended for it; nor for a Ctrl-C where the
    attempt loop has had this process ignore it."""
    parsed = torchrun.parse_args(arguments)
    if drain.is_wanted():
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        parsed.signals_to_handle = "SIGHUP,SIGQUIT" if ignored else "SIGINT,SIGHUP,SIGQUIT"
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    return parsed


if __name__ == "__main__":
    sys.exit(main())
