"""Every error that capfilt raises on purpose.

CapfiltError                a failure that names its cause                     (exit status 1)
├── ConfigError             a bad argument, configuration key or value         (exit status 2)
├── InputError              a table of the user's is missing, unreadable, empty or lacks a column
├── WorkspaceError          the workspace cannot be read or written
├── ShardError              a part (shard, annotation or corpus file) is torn or of another schema
├── DownloadError           a shard could not be fetched at all
├── CheckpointError         a checkpoint is missing, torn or of another shape
├── TrainingError           training cannot start or has diverged
├── RoundRejected           a round was made and judged, and may not be promoted
└── QueryError              a SQL statement or predicate that cannot or may not run

A message names the thing, says what was found and what would be right. The command line prints it as
one line; nothing else in the project catches it to go on.
"""


class CapfiltError(Exception):
    """The root: catch this one to catch them all."""

    exit_status = 1


class ConfigError(CapfiltError):
    """A bad argument, configuration key or value."""

    exit_status = 2


class InputError(CapfiltError):
    """A table that the user named is missing, unreadable, empty or lacks a column."""


class WorkspaceError(CapfiltError):
    """The workspace cannot be read or written."""


class ShardError(CapfiltError):
    """A Parquet part is torn, or is not of the schema that its place promises."""


class DownloadError(CapfiltError):
    """A shard could not be fetched at all."""


class CheckpointError(CapfiltError):
    """A checkpoint is missing, torn, or of another shape than the model."""


class TrainingError(CapfiltError):
    """Training cannot start, or its loss is no longer a number."""


class RoundRejected(CapfiltError):
    """A round was made and judged, and may not be promoted."""


class QueryError(CapfiltError):
    """A SQL statement or predicate that cannot run, or that may not."""


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
