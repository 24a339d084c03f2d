"""The errors of WanFlow: each is a sentence that says what was found, what is needed, and what to do.

They are `ValueError`s raised at the edge, where the name of the input is still known, so that a user reads one line
instead of a traceback from inside a network.
"""


class WanError(ValueError):
    """A sentence for the user."""


class FileError(WanError):
    """A file is missing, truncated, unsafe, or of another kind than the one asked for."""


class InputError(WanError):
    """A value or a size that cannot work."""


class ModelError(WanError):
    """The loaded model cannot do what an input asks of it."""


class MemoryShortage(WanError):
    """Memory ran out, and everything that could be given back was."""


class Lost(WanError):
    """Another of several processes has ended, or will. It says why; this one only follows."""
