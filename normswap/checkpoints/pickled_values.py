"""Makes the numbers, texts and containers that a pickle asks for: Python's own, and a few of torch's.

As in `pickled_tensors`, each maker gets the `Claims` of the file first, then the arguments in the pickle.
"""

import datetime
import functools
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch.torch_version import TorchVersion

from normswap.checkpoints.pickle_claims import ITEM, Claims, is_count, refuse, shape_of

_FACTORIES = (None, list, dict, set, tuple, int, float, bool, str, OrderedDict, Counter, deque)
_PLAIN = (int, float, bool, str, bytes, type(None), datetime.timedelta, datetime.timezone)
_LONGEST_NUMBER = 1000  # characters of a Decimal


def bytes_of_text(claims: Claims, text: Any, encoding: Any) -> bytes:
    """As `codecs.encode`, by which pickle keeps bytes; other encodings than this one may take forever."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise refuse("encodes other than text as latin1")
    claims.take(len(text))
    return text.encode("latin1")


def no_bytes(claims: Claims) -> bytes:
    """As `bytes()`, by which pickle keeps those without any."""
    return b""


def byte_array(claims: Claims, *content: Any) -> bytearray:
    """As `bytearray`, of bytes or of text in latin1; never of a number, which would be its size."""
    if content and type(content[0]) is str:
        return bytearray(bytes_of_text(claims, *content))
    if content and (len(content) > 1 or type(content[0]) is not bytes):
        raise refuse("makes a bytearray of other than bytes")
    claims.take(len(content[0]) if content else 0)
    return bytearray(*content)


def _items(claims: Claims, content: tuple[Any, ...]) -> Iterable[Any]:
    """The elements in the one argument of a collection, which may be left out."""
    if not content:
        return ()
    if len(content) > 1 or type(content[0]) not in (list, tuple):
        raise refuse("makes a collection of no list")
    claims.take(ITEM * len(content[0]))
    items: Iterable[Any] = content[0]
    return items


def made_set(claims: Claims, *content: Any) -> set[Any]:
    """As `set`."""
    made: set[Any] = set()
    for item in _items(claims, content):
        claims.check_key(made, item)
        made.add(item)
    return made


def frozen_set(claims: Claims, *content: Any) -> frozenset[Any]:
    """As `frozenset`."""
    return frozenset(made_set(claims, *content))


def made_deque(claims: Claims, content: Any = (), longest: Any = None) -> deque[Any]:
    """As `collections.deque`."""
    if longest is not None and not is_count(longest):
        raise refuse("makes a deque of no length")
    return deque(_items(claims, (content,)), longest)


def ordered_dict(claims: Claims, *content: Any) -> OrderedDict[Any, Any]:
    """As `collections.OrderedDict`, to which Python 2 gave lists of two."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in _items(claims, content) if content else ():  # most are empty
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise refuse("makes an OrderedDict of other than pairs")
        claims.check_key(made, pair[0])
        made[pair[0]] = pair[1]
    return made


def counter(claims: Claims, content: Any = None) -> Counter[Any]:
    """As `collections.Counter`, of a dict."""
    if type(content) not in (dict, type(None)):
        raise refuse("makes a Counter of no dict")
    claims.take(ITEM * len(content or ()))
    made: Counter[Any] = Counter()
    dict.update(made, content or {})
    return made


def default_dict(claims: Claims, factory: Any = None) -> defaultdict[Any, Any]:
    """As `collections.defaultdict`, whose factory is a class of Python's own that makes an empty object."""
    if not any(factory is known for known in _FACTORIES):
        raise refuse("makes a defaultdict that calls other than a class of Python's own")
    return defaultdict(factory)


def complex_number(claims: Claims, real: Any, imaginary: Any) -> complex:
    """As `complex`, of numbers alone."""
    return complex(float(plain_number(real)), float(plain_number(imaginary)))


def plain_number(value: Any) -> Any:
    """A value that is a number. Raises `UnsafeFileError` for all else."""
    if type(value) not in (int, float, bool):
        raise refuse("makes a number of none")
    return value


def decimal_number(kind: Any, claims: Claims, text: Any) -> Any:
    """As `decimal.Decimal`, of text."""
    if type(text) is not str or len(text) > _LONGEST_NUMBER:
        raise refuse("makes a Decimal of other than a short text")
    return kind(text)


def of_texts(kind: Any, claims: Claims, *texts: Any) -> Any:
    """A path of its parts."""
    if not all(type(text) is str for text in texts):
        raise refuse(f"makes a {kind.__name__} of other than text")
    claims.take(sum(map(len, texts)))
    return kind(*texts)


def of_plain(kind: Any, claims: Claims, *arguments: Any) -> Any:
    """An object of a class of Python's or torch's own that is made of few numbers, bytes, texts and the like.

    Of nothing else: to hash or to compare a tuple that holds itself many times over takes forever.
    """
    if not all(type(part) in _PLAIN for part in arguments):
        raise refuse(f"makes a {kind.__name__} of other than numbers and texts")
    claims.take(sum(len(part) if isinstance(part, str | bytes) else 1 for part in arguments))
    return kind(*arguments)


def struct_time(claims: Claims, numbers: Any, others: Any = None) -> time.struct_time:
    """As `time.struct_time`, of its nine numbers, and of those that have only names."""
    held = (
        [*numbers, *(others or {}).values()] if type(numbers) is tuple and type(others) in (dict, type(None)) else [()]
    )
    if len(held) > 20 or not all(type(part) in _PLAIN for part in held):
        raise refuse("makes a struct_time of other than numbers")
    return time.struct_time(numbers, others or {})


def torch_version(claims: Claims, text: Any) -> Any:
    """As `torch.torch_version.TorchVersion`, of text alone: as text, a list that holds itself often fills memory."""
    if type(text) is not str:
        raise refuse("has a version of torch that is no text")
    claims.take(len(text))
    return TorchVersion(text)


def size_of(claims: Claims, sizes: Any = ()) -> torch.Size:
    """As `torch.Size`."""
    claims.take(ITEM * len(shape_of(sizes)))
    return torch.Size(shape_of(sizes))


def partial(claims: Claims, function: Any, *arguments: Any) -> Any:
    """As `functools.partial`, which calls nothing yet."""
    return functools.partial(function, *arguments)
