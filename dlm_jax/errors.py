"""The one exception that means "the input is at fault, and here is how to mend it"."""


class UserError(Exception):
    """A mistake in the input. Its text is one sentence: the cause, then the mend.

    The command line prints it on stderr and exits with code 2; the library raises it as it is.
    """


class Stopped(Exception):
    """A run that was asked to end, by SIGTERM, and has saved its state."""
