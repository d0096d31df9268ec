"""Everything that can go wrong through no fault of ours, as a tree.

    RegardError
    ├── ConfigError        a setting that is unknown, out of range, or does not fit another
    ├── DataError          a file of text that is missing, is not text, or does not fit its partner
    ├── RunError           a run's folder that is missing, empty, taken, or not what was asked for
    │   └── CheckpointError   a checkpoint that is cut short, altered, or of another model
    ├── MissingExtra       an optional package that this command needs; the message holds its install command
    └── Interrupted        a training was told to stop, and has saved; the message says how to go on

Each message says where, what is, what was expected and what to do. The command line prints it without a traceback
and exits with 2. A bug of ours is an AssertionError or anything else, and does show its traceback.
"""


class RegardError(Exception):
    """The root: catch this to catch every mistake a user can make."""


class ConfigError(RegardError):
    """A setting is unknown, out of range, or does not fit another setting."""


class DataError(RegardError):
    """A file of text is missing, unreadable, or does not fit its partner."""


class RunError(RegardError):
    """A run's folder is missing, empty, already taken, or cannot be written."""


class CheckpointError(RunError):
    """A checkpoint is cut short, altered, or belongs to another model."""


class MissingExtra(RegardError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f'{purpose} needs the package "{package}", which is not installed. '
            f"Install it with: pip install 'regard[{extra}]'"
        )


class Interrupted(RegardError):
    """A training was told to stop by a signal, and has saved a checkpoint.

    Attributes:
        signal: its number, 2 for Ctrl-C; the command line exits with 128 + signal.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal
