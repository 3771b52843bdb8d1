"""What a user is told in one line: the command line prints the message and exits with the code named here."""


class UsageError(ValueError):
    """Something that the user can put right (exit code 2). The message says what, expected, got, and what to do."""


class JobError(RuntimeError):
    """The work itself could not be done (exit code 1). The message is one line; what was finished is kept."""
