"""The one exception for a user's mistake: the command line prints its message as one line and exits with code 2."""


class UsageError(ValueError):
    """Something that the user can put right. The message says what, expected, got, and what to do, on one line."""
