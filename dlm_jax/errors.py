"""The exceptions that are part of the interface, and how text in them is made safe to show."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence: the cause, then the fix.

    The command line prints it on stderr and exits with code 2; the library raises it unchanged. It may quote a file, so
    a long one loses its middle.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class Stopped(Exception):
    """A run that a signal asked to end, and that has saved its state."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports a process that the signal ended


def shortened(text: str, most: int = 1000) -> str:
    """The text without its middle where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def printable(text: str) -> str:
    r"""The text with unprintable characters spelled out, such as `\n` or `\x1b`, which begins a terminal's commands.

    Names in the files of a model may be a stranger's.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
