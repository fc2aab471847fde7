"""Mistakes a user can make. Every message says what was found, what was expected and which key or file to change.

The command line prints these as one line and exits with `exit_code`: 78 for a run that cannot work as it is configured, 65 for data that
cannot be read, 2 otherwise. Starting again does not help against the first two. Anything else is a programmer's mistake and keeps its
traceback.
"""


class MegarlError(Exception):
    """Base of all user-facing errors. The command line prints the message alone, on every kind of failure."""

    exit_code = 2


class ConfigError(MegarlError):
    """A configuration file or override is wrong. `faults` holds one sentence for each fault found, all reported together."""

    exit_code = 78  # EX_CONFIG of sysexits.h

    def __init__(self, faults: "str | list[str]"):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class LayoutError(MegarlError):
    """The parallel layout does not fit the world size or the model."""

    exit_code = 78


class DataError(MegarlError):
    """A dataset or tokenizer file is missing or malformed: file, line, reason."""

    exit_code = 65  # EX_DATAERR


class WeightMapError(MegarlError):
    """A Hugging Face directory, a family table and a model disagree about a tensor."""

    exit_code = 78


class CheckpointError(MegarlError):
    """A checkpoint is missing, incomplete or belongs to another model or layout."""


class DamageError(CheckpointError):
    """A file of a checkpoint is not what was written: another checkpoint may serve."""


class FencedError(CheckpointError):
    """Another start of the same run has taken over its directory: this one must not write there any more."""


class RolloutError(MegarlError):
    """The sampler could not start, or returned something that is not a completion."""


class RewardError(MegarlError):
    """A reward could not be computed or is not a finite number."""


class LearningError(MegarlError):
    """Losses or gradients have not been finite numbers for several updates in a row. Raised on all ranks alike."""


class SetupError(MegarlError):
    """This machine cannot run megarl as asked: a missing package, device, directory or amount of disk."""


def error_kinds() -> dict[str, type[MegarlError]]:
    """Every error class by its name: how an error that crossed a process boundary becomes one again."""
    kinds, waiting = {}, [MegarlError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return kinds
