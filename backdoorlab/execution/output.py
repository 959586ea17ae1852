"""Standard output and error that never stop a run: without a reader, in any encoding, or closed."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = frozenset([errno.EPIPE, errno.EIO])
"""Errors of writing to a pipe whose reader has ended, and to a terminal that was closed."""
STANDARD = ("stdout", "stderr")


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let work inside go on when its standard output or error ends.

    What is written after a pipe was closed is lost. A character that the encoding lacks is
    written as an escape, such as \\u2020 for a dagger.
    """
    _fill_closed()
    before = {name: getattr(sys, name) for name in STANDARD}
    with contextlib.ExitStack() as stack:
        try:
            for name, stream in before.items():
                # A run inside of another leaves the streams as they are.
                if not isinstance(stream, _Lasting):
                    stream = (
                        stack.enter_context(open(os.devnull, "w")) if stream is None else stream
                    )
                    stack.enter_context(_escaping(stream))
                    setattr(sys, name, _Lasting(stream, to_lose_all=name == "stderr"))
            yield
        finally:
            # Python tries again at its end what cannot be written here.
            for name, stream in before.items():
                with contextlib.suppress(OSError):
                    getattr(sys, name).flush()
                setattr(sys, name, stream)


class _Lasting:
    """A text stream that is replaced by nothing once it cannot be written any more."""

    def __init__(self, stream: TextIO, to_lose_all: bool) -> None:
        """Wrap a stream.

        Args:
            stream: open for writing.
            to_lose_all: any error ends its output, as for a log on a full disk; else those of
                GONE do.
        """
        self._stream, self._to_lose_all = stream, to_lose_all

    def write(self, text: str) -> int:
        self._lasting(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._lasting(lambda: self._stream.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lasting(self, output: Callable[[], Any]) -> None:
        try:
            output()
        except OSError as error:
            if not self._to_lose_all and error.errno not in GONE:
                raise
            # Python's own buffer keeps what it could not write, so its file must lead elsewhere.
            with contextlib.suppress(OSError):
                _lead_nowhere(self._stream.fileno())


def _lead_nowhere(descriptor: int) -> None:
    """Let an open file descriptor be that of the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _fill_closed() -> None:
    """Open the null device in place of each of the descriptors 0, 1 and 2 that is closed.

    A record's file would be opened as one of them, and be mixed with what libraries print.
    """
    # The lowest free number is taken first.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """Let a stream escape the characters that its encoding lacks, where it would raise an error."""
    errors, reconfigure = getattr(stream, "errors", None), getattr(stream, "reconfigure", None)
    if reconfigure is None or errors not in ("strict", "surrogateescape"):
        yield
        return
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            reconfigure(errors=errors)
