"""What goes wrong for a user's reason: one or two lines that name the thing and the remedy, and an exit code."""

from __future__ import annotations


class TrainError(Exception):
    """A training run cannot start or go on. `exit_code` is what the script exits with."""

    exit_code = 1


class UsageError(TrainError):
    """The configuration, the data or the checkpoint given cannot be used: nothing was trained."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong; the message names the key and where it came from."""


class DataError(UsageError):
    """The dataset is missing, empty, unreadable or too short."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or belongs to another run; the message names the last good one."""


class LostDataError(TrainError):
    """A stream of data broke off."""


class SaveError(TrainError):
    """A checkpoint or a log could not be written; the message names the last good checkpoint."""


class NonFiniteError(TrainError):
    """The loss or the gradient stopped being a finite number; the message names the step."""
