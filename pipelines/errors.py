"""What can go wrong with a run, as exceptions that name the object and the next step.

Faults of the data are not here: a bad sample is a value, a `contracts.Reject`.
"""

from pipelines.secrets import masked


class VecmillError(Exception):
    """Base of every error a user should read as one message, without a traceback.

    what: the object and what is wrong with it. fix: what to do next. Credentials in them are masked.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        what, fix = masked(what), masked(fix)
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  {self.fix}" if self.fix else self.what


class ConfigError(VecmillError):
    """A setting, flag or name that cannot be used as given."""

    exit_code = 2


class InputError(VecmillError):
    """The input as a whole cannot be read: missing, empty, or of no known format."""

    exit_code = 2


class PreflightError(VecmillError):
    """The run would hang or fail later: too few CPUs, no GPU, an output that is not ours."""

    exit_code = 2


class StorageError(VecmillError):
    """Storage failed in a way that retrying did not cure."""


class AccessError(StorageError, PermissionError):
    """Storage refuses: credentials or permissions, which asking again does not change."""

    exit_code = 2


class ChangedInputError(VecmillError):
    """An input object is no longer what it was when the run was planned."""


class EncoderError(VecmillError):
    """A checkpoint or model that cannot be loaded exactly."""


class LedgerError(VecmillError):
    """Counts, checksums or commits of an output do not agree."""


class IndexBuildError(VecmillError):
    """An index that cannot be built or does not hold what its manifest says."""


class StalledError(VecmillError):
    """A stage that has made no progress for the time that was set."""


class WorkerError(VecmillError):
    """Ray's processes die, cannot start, or have no room."""


class HeldError(VecmillError):
    """Another run is at work on the output, or has taken it over."""

    exit_code = 4
