"""The one exception that a user can cause."""


class MoefyError(Exception):
    """An error that the user can fix: one line with what was found, expected, and what to do.

    `code` is the exit status of the command line: 2 usage, 3 bad input, 4 unsupported,
    5 resources, 6 numeric, 7 bad saved state.
    """

    def __init__(self, message: str, *, code: int = 3) -> None:
        # A name read from a file may hold line breaks or terminal codes; a message is one line.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
        self.code = code


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has no exception of its own for that of a machine."""
    words = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def first_line(error: Exception, most: int = 200) -> str:
    """The first line of what another library says, or the error's class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
