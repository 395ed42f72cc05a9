"""Text files of data opened: what is compressed is unpacked, what only looks like text in UTF-8 refused.

The content decides whether a file is compressed, because browsers that unpack a download leave it its name.
"""

import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minidpo.data.bad_record import LONGEST_RECORD
from minidpo.errors import UserError, one_line
from minidpo.files import require_no_pointer

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

# A block of zstd has at least 4 bytes and unpacks to at most 128 KiB, so this many unpack to LONGEST_RECORD.
_ZSTD_BYTES = LONGEST_RECORD // 2**17 * 4


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedIOBase | Any]:
    """The bytes of a text file, unpacked. Raises `UserError` for what is no text in UTF-8; reading a torn
    compressed file raises OSError or EOFError."""
    with path.open("rb") as raw:
        file: Any = raw
        if raw.peek(4)[:2] == _GZIP:
            file = gzip.open(raw)
        elif raw.peek(4)[:4] == _ZSTD:
            file = io.BufferedReader(_Zstd(path, raw))
        begin = file.peek(1024)[:1024]
        require_no_pointer(path, begin)
        if (encoding := json.detect_encoding(begin).removesuffix("-sig")) != "utf-8":
            right = f"convert it: iconv -f {encoding} -t utf-8 '{path}'"
            raise UserError(f"{path}: text in {encoding.upper()}, and UTF-8 is read; {right}")
        if begin.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
            raise UserError(f"{path}: a web page, not data; download the file that the page is about")
        yield file


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, unpacked. The readers of the package zstandard take a torn file for a whole
    one, but its decompressor knows where a frame ends, as does that of Python 3.14."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self._new_frame, self._error = _zstd(path)
        self._file, self._frame, self._unpacked = file, self._new_frame(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            ended = self._frame.eof
            packed = (ended and self._frame.unused_data) or self._file.read(_ZSTD_BYTES)
            if not packed:
                if not ended:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if ended:
                self._frame = self._new_frame()
            try:
                self._unpacked = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(one_line(error)) from None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


def _zstd(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor of one frame, and the error that it raises."""
    with suppress(ImportError):
        module: Any = importlib.import_module("compression.zstd")  # since Python 3.14
        return module.ZstdDecompressor, module.ZstdError
    try:
        import zstandard
    except ImportError:
        what = "compressed with zstd, which this Python cannot read"
        raise UserError(f"{path}: {what}; pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
