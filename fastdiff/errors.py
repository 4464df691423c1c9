"""What a user can fix, each kind with the exit code the command line ends with.

A message is one line: what was found, where, and what to do about it.
"""


class FastdiffError(Exception):
    """A failure with a one-line message. The command line prints it without a traceback."""

    exit_code = 1


class OptionError(FastdiffError):
    """An option that cannot work: out of range, in conflict with another, unknown."""

    exit_code = 2


class InputError(FastdiffError):
    """An input or artefact that is missing, malformed, corrupt or of another schema."""

    exit_code = 3


class ResourceError(FastdiffError):
    """Out of disk space or memory."""

    exit_code = 4


class RemoteError(FastdiffError):
    """A remote service failed."""

    exit_code = 5


class LockedError(FastdiffError):
    """Another process is writing the same directory."""

    exit_code = 6
