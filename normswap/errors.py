"""What normswap raises: a message of its own says what, where and what to do.

NormswapError
├── OptionError          a target or an option that does not exist or does not fit
├── ModelError           a model that cannot be converted
└── FileError            a file that cannot be read or written
    └── UnsafeFileError  a pickle that names a class outside the allowed ones
"""

from normswap.printable import printable

_LONGEST = 1500  # characters of a message; names in a file can be of any length


class NormswapError(Exception):
    """Base of all errors that normswap raises on purpose; its message is one printable line, whatever a file says."""

    def __init__(self, message: str):
        message = printable(message)
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…")


class OptionError(NormswapError, ValueError):
    """A target or an option that does not exist, or does not fit the model."""


class ModelError(NormswapError):
    """A model that cannot be converted; it is left as it was."""


class FileError(NormswapError):
    """A file that cannot be read or written; nothing was written."""


class UnsafeFileError(FileError):
    """A pickle that asks for a class outside the allowed ones; its code did not run."""


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error that is not ours, for a message of ours."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def path_error(path: object, error: Exception) -> FileError:
    """The error for a path that cannot be opened, with what the system says; a `ValueError` means an odd name."""
    return FileError(f"{path}: {getattr(error, 'strerror', None) or error}; check the name and the folder")
