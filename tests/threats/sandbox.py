"""A process of its own with little memory and time, so that no file can hurt the tests themselves."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

ADDRESSES = 6 << 30
"""Bytes of address space, beyond what torch takes when it is imported."""
WRITTEN = 256 << 20
"""Bytes that one file may grow to."""


def in_sandbox(work: Callable[[Callable[[object], None]], None], seconds: float) -> tuple[list[Any], str]:
    """What `work` reported, and how it ended if not well: a crash, or `seconds` without a report."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _limit()
            work(lambda found: _send(writer, pickle.dumps(found)))
        except BaseException as error:
            _send(writer, pickle.dumps(f"the test itself failed: {type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    os.close(writer)
    received, deadline = bytearray(), time.monotonic() + seconds
    end = ""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            end = f"took more than {seconds:g} s"
            break
        block = os.read(reader, 1 << 16)
        if not block:
            break
        received += block
        deadline = time.monotonic() + seconds
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if not end and os.WIFSIGNALED(status):
        end = f"crashed with {signal.Signals(os.WTERMSIG(status)).name}"
    return _received(received), end


def _limit() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, taken + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _send(writer: int, data: bytes) -> None:
    block = struct.pack("<I", len(data)) + data
    while block:
        block = block[os.write(writer, block) :]


def _received(data: bytes | bytearray) -> list[Any]:
    found, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):
            break
        found.append(pickle.loads(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return found
