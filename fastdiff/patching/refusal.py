"""Why the language models of a store cannot be run again: for some stages an error, for others a thing to report."""

from fastdiff.errors import InputError


class CannotRun(InputError):
    """The models behind a store cannot be run as they were.

    Attributes:
        reason: What was found, and where.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy
