"""What the objects of one pickle may take together, bounded by the size of its file, and how one is refused."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from normswap.errors import FileError, UnsafeFileError

MOST_SHARED = 64
"""Times its size that the tensors of a file may claim together: some share memory, or repeat their elements."""
ITEM = 8
"""Bytes of an entry in a list."""
_MOST_TAKEN = 10  # times its size that what is made out of a pickle may take
_SMALLEST = 1 << 12  # bytes that a pickle may always claim
_LARGEST_KEY, _MOST_ALIKE = 1000, 100  # parts of the key of a dict; keys of one hash


class Claims:
    """What the objects of one file may take together, and what is to be checked when all of it has been read.

    Args:
        file_size: bytes of the file, which bound its tensors.
        pickle_size: bytes of the pickle, which bound all else.
    """

    def __init__(self, file_size: int, pickle_size: int):
        self.file_size = file_size
        self.checks: list[Callable[[], object]] = []
        self.kinds_of_tensor: list[Any] = [Tensor, nn.Parameter]
        self._left = max(_MOST_TAKEN * pickle_size, _SMALLEST)
        self._left_for_tensors = MOST_SHARED * file_size
        self._left_for_copies = 2 * file_size
        self._alike: Counter[tuple[int, int]] = Counter()

    def take(self, size: int) -> None:
        """Count `size` bytes of memory. Raises `FileError` where a pickle of this size has no use for so much."""
        self._left -= size
        if self._left < 0:
            raise FileError("its pickle makes far more than it holds")

    def take_tensor(self, size: int) -> None:
        """Count a tensor of `size` bytes: a view can repeat one element without end, to fill memory."""
        self._left_for_tensors -= size
        if size > self.file_size or self._left_for_tensors < 0:
            raise FileError(f"a tensor claims more than the file holds: {size:,} bytes")

    def take_copy(self, size: int) -> None:
        """Count `size` bytes of tensors that are no view of the file: read from it, or converted once."""
        self._left_for_copies -= size
        if self._left_for_copies < 0:
            raise FileError("its tensors claim more than the file holds")

    def check_key(self, target: object, key: Any) -> None:
        """Refuse a key whose hash takes forever, and many of one hash in one `target`: each is compared with all."""
        if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
            return
        parts, seen = [key], 0
        while parts:
            part = parts.pop()
            seen += 1
            if isinstance(part, tuple):
                parts.extend(part)
            if seen + len(parts) > _LARGEST_KEY:
                raise FileError("it has a key of a dict with too many parts")
        place = id(target), hash(key)
        self._alike[place] += 1
        if self._alike[place] > _MOST_ALIKE:
            raise FileError("it has too many keys of one hash")


def refuse(what: str) -> UnsafeFileError:
    """The error for a pickle that does what those of torch never do."""
    return UnsafeFileError(f"is not what torch.save makes of a model: it {what}")


def shown(value: Any) -> str:
    """A value for a message: a text, and of all else its class, since what holds itself often is text without end."""
    return repr(value)[:40] if type(value) is str else f"a {type(value).__name__}"


def is_count(value: Any) -> bool:
    """Whether a value is a number of elements, a size or an offset."""
    return type(value) is int and 0 <= value < 1 << 62


def shape_of(value: Any) -> tuple[int, ...]:
    """A value as the sizes of a tensor or an array. Raises `FileError` for what is none."""
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(map(is_count, value)):
        raise FileError("it has a shape that is none")
    return tuple(value)
