"""Reads pickles by a table of what they may do, and bounds what they make by the size of their file."""

import _compat_pickle
import os
import pickle
import pickletools
from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import Any, BinaryIO, ClassVar

import numpy
from torch import Tensor

from normswap.checkpoints.allowed_calls import DTYPE_ROW, Row
from normswap.checkpoints.pickle_claims import Claims, refuse
from normswap.checkpoints.pickled_values import frozen_set

_OPCODES = (
    pickle.PROTO, pickle.MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.SHORT_BINSTRING,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.LONG_BINGET, pickle.BINPUT, pickle.MEMOIZE,
    pickle.POP, pickle.POP_MARK, pickle.STACK_GLOBAL, pickle.BINPERSID,
)  # fmt: skip
"""What Python's own reader does, as do those in `load`: it moves what is on the stack, or makes of bytes in the file
what is no larger."""
_uint32 = Struct("<I").unpack_from
_BLOCK = 1 << 16  # bytes that are read at once
_LONGEST = 5  # bytes of the longest instruction that `load` takes from the block itself
_STOP, _BINGET, _LONG_BINPUT, _EMPTY_TUPLE, _BININT1, _REDUCE = (
    code[0]
    for code in (pickle.STOP, pickle.BINGET, pickle.LONG_BINPUT, pickle.EMPTY_TUPLE, pickle.BININT1, pickle.REDUCE)
)
_EMPTY = 24  # bytes that an empty container counts: it takes one of the file, and more than three with its place
_MOST_NAMES, _MOST_LOOKED_AT = 1000, 1_000_000  # that a message can name; instructions that are searched for them


class UnknownName(Exception):
    """A pickle names what is in no row; its one argument is the full name."""


class Unpickler(pickle._Unpickler):
    """Reads one pickle.

    Python's reader in Python, of which only the instructions in `_OPCODES` and those below are there: the one in C
    takes memory for whatever number a memo entry claims.

    Args:
        stream: begins with the pickle, and stands behind it in the end; it reads no more than there is, whatever number
            of bytes is asked for.
        claims: what the objects of the file may take together.
        row_of: the row of a full name; None where the name is not allowed.
        load_storage: the storage of a persistent id; None: the pickle may have none.
    """

    stack: list[Any]  # these six are of the class above
    metastack: list[list[Any]]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def __init__(
        self,
        stream: BinaryIO | Any,
        claims: Claims,
        row_of: Callable[[str], Row | None],
        load_storage: Callable[[Any], Any] | None = None,
    ):
        super().__init__(stream, encoding="utf-8")
        self.stream, self.block, self.at = stream, b"", 0  # what is read of it at once, and the next byte of that
        self.claims, self.row_of, self.load_storage = claims, row_of, load_storage
        self.rows: dict[int, Row] = {}  # by the id of each object that was named, which `named` keeps alive
        self.named: dict[str, Any] = {}

    def load(self) -> Any:
        """The object. As in the class above, with the commonest instructions at hand."""
        self.metastack, self.stack = [], []
        self.append = self.stack.append
        memo, dispatch = self.memo, self.dispatch
        block, at, stack = self.block, self.at, self.stack
        last = -1  # where such an instruction may begin
        while True:
            if at > last:
                block, at = self._next_block(at)
                last = len(block) - _LONGEST
            code = block[at]
            if code == _BINGET:
                stack.append(memo[block[at + 1]])
                at += 2
            elif code == _LONG_BINPUT:
                memo[_uint32(block, at + 1)[0]] = stack[-1]
                at += 5
            elif code == _EMPTY_TUPLE:
                stack.append(())
                at += 1
            elif code == _BININT1:
                stack.append(block[at + 1])
                at += 2
            elif code == _REDUCE:
                self.load_reduce()
                at += 1
            elif code == _STOP:
                break
            else:
                self.block, self.at = block, at + 1
                dispatch[code](self)
                block, at, stack = self.block, self.at, self.stack
                last = len(block) - _LONGEST
        self.stream.seek(at + 1 - len(block), os.SEEK_CUR)
        return stack.pop()

    def _next_block(self, at: int) -> tuple[bytes, int]:
        """What is left of the block from `at` on, and more of the stream, where there is any; and where to go on."""
        self.block, self.at = self.block[at:] + self.stream.read(_BLOCK), 0
        if not self.block:
            raise EOFError("the pickle has no end")
        return self.block, self.at

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the stream, or as many as there are."""
        start, self.at = self.at, self.at + size
        if self.at <= len(self.block):
            return self.block[start : self.at]
        left, self.block, self.at = self.block[start:], b"", 0
        return left + self.stream.read(size - len(left))

    def readline(self) -> bytes:
        """The rest of the stream's line, with the end of that where there is one."""
        end = self.block.find(b"\n", self.at) + 1
        if end:
            return self.read(end - self.at)
        return self.read(len(self.block) - self.at) + self.stream.readline()

    def load_frame(self) -> None:
        """How much of the pickle to read at once: nothing here asks for that."""
        self.read(8)

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle calls `name` in `module`, in Python 2's names or 3's."""
        full = _full_name(module, name)
        if full not in self.named:
            row = self.row_of(full)
            if row is None:
                raise UnknownName(full)
            self.named[full] = row.value
            self.rows[id(row.value)] = row
            if isinstance(row.value, type) and issubclass(row.value, Tensor) and row.build is not None:
                self.claims.kinds_of_tensor.append(row.value)  # that the user allows
        return self.named[full]

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a persistent id stands for."""
        if self.load_storage is None:
            raise refuse("has parts outside its pickle")
        return self.load_storage(pid)

    def load_reduce(self) -> None:
        """Call what was named, as its row says."""
        arguments, function = self._arguments(), self.stack[-1]
        row = self.rows.get(id(function))
        if row is None or row.call is None:
            raise refuse(f"calls {_name(function)}(...)")
        self.claims.take(_EMPTY)
        self.stack[-1] = row.call(self.claims, *arguments)

    def load_newobj(self) -> None:
        """Make an object without its constructor, as the row of its class says."""
        arguments, kind = self._arguments(), self.stack.pop()
        row = self.rows.get(id(kind))
        if row is None or row.new is None:
            raise refuse(f"makes a {_name(kind)} anew")
        self.claims.take(_EMPTY)
        self.append(row.new(self.claims, *arguments))

    def _arguments(self) -> tuple[Any, ...]:
        arguments: Any = self.stack.pop()
        if type(arguments) is not tuple:
            raise refuse("calls something with other than a tuple")
        return arguments  # type: ignore[no-any-return]

    def load_build(self) -> None:
        """Give an object its state, as the row of its class says."""
        state, made = self.stack.pop(), self.stack[-1]
        row = DTYPE_ROW if isinstance(made, numpy.dtype) else self.rows.get(id(type(made)))
        if row is None or row.build is None:
            raise refuse(f"changes a {_name(type(made))}")
        row.build(self.claims, made, state)

    def load_setitems(self) -> None:
        """Put the entries above the mark into a dict."""
        items = self.pop_mark()
        self._set(items[::2], items[1::2])

    def load_setitem(self) -> None:
        """Put one entry into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key], [value])

    def _set(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict and not (isinstance(target, dict) and self._may_be_filled(target)):
            raise refuse(f"puts entries into a {_name(type(target))}")
        if type(target) is dict and {*map(type, keys)} <= {str}:  # as by far the most
            target.update(zip(keys, values, strict=True))
            return
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str:
                self.claims.check_key(target, key)
            target[key] = value

    def load_appends(self) -> None:
        """Put what is above the mark into a list."""
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is set:
            for item in items:
                self.claims.check_key(target, item)
                target.add(item)
            return
        if type(target) is not list and not (isinstance(target, list | deque) and self._may_be_filled(target)):
            raise refuse(f"puts entries into a {_name(type(target))}")
        target.extend(items)

    def load_append(self) -> None:
        """Put one entry into a list."""
        self.metastack.append(self.stack)
        self.stack = [self.stack.pop()]
        self.load_appends()

    def _may_be_filled(self, target: Any) -> bool:
        row = self.rows.get(id(type(target)))
        return row is not None and row.filled

    def load_empty_list(self) -> None:
        """An empty list."""
        self.claims.take(_EMPTY)
        self.append([])

    def load_empty_dictionary(self) -> None:
        """An empty dict."""
        self.claims.take(_EMPTY)
        self.append({})

    def load_empty_set(self) -> None:
        """An empty set."""
        self.claims.take(_EMPTY)
        self.append(set())

    def load_frozenset(self) -> None:
        """A frozenset of what is above the mark."""
        items = self.pop_mark()
        self.append(frozen_set(self.claims, items))

    def load_global(self) -> None:
        """What is named on two lines."""
        module, name = (self.readline()[:-1].decode() for _ in range(2))
        self.append(self.find_class(module, name))

    dispatch |= {code[0]: load for code, load in (
        (pickle.FRAME, load_frame), (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj),
        (pickle.BUILD, load_build), (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems),
        (pickle.APPEND, load_append), (pickle.APPENDS, load_appends), (pickle.ADDITEMS, load_appends),
        (pickle.EMPTY_LIST, load_empty_list), (pickle.EMPTY_DICT, load_empty_dictionary),
        (pickle.EMPTY_SET, load_empty_set), (pickle.FROZENSET, load_frozenset), (pickle.GLOBAL, load_global),
    )}  # fmt: skip


def _full_name(module: str, name: str) -> str:
    """In the names of Python 3."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = getattr(value, "__name__", None) if callable(value) and not isinstance(value, type) else None
    return str(name or kind.__qualname__)[:100]


def names_in(data: bytes) -> list[str]:
    """The full names of all that a pickle asks for, sorted; of a long one, those in its first part."""
    found: set[str] = set()
    memo: dict[Any, Any] = {}
    last: deque[Any] = deque([None, None], 2)  # that was put on the stack: of protocol 4 on, the two parts of a name
    try:
        for count, (code, value, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_LOOKED_AT or len(found) > _MOST_NAMES:
                break
            if code.name == "GLOBAL":
                module, _, name = str(value).rpartition(" ")
                found.add(_full_name(module, name))
            elif code.name == "STACK_GLOBAL" and all(type(part) is str for part in last):
                found.add(_full_name(*last))
            if code.name == "MEMOIZE":
                memo[len(memo)] = last[-1]
            else:
                last.append(memo.get(value) if code.name.endswith("BINGET") else value)
    except Exception:  # whatever is wrong with the rest: reading it says better
        pass
    return sorted(found)
