"""What a user is told in one line: the command line prints the message and exits with the code named here."""

import signal


class UsageError(ValueError):
    """Something that the user can put right (exit code 2). The message says what, expected, got, and what to do."""


class StoppedError(Exception):
    """A signal ended the work, and everything is saved. ``exit_code`` tells a scheduler to run it again, or not."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 75  # what shells give for Ctrl-C; EX_TEMPFAIL


class JobError(RuntimeError):
    """The work itself could not be done (exit code 1). The message is one line; what was finished is kept."""


class AudioError(Exception):
    """Audio that cannot be had; the message says which and why."""


class TruncatedError(AudioError):
    """Audio that lacks its end."""
