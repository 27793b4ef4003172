"""Compressed files opened as if they were not: gzip and Zstandard, told by their first bytes.

A file that ends in the middle is an error, never a shorter file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from weitiao.errors import DataError

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CHUNK_BYTES = 1 << 17
_PACKED_BYTES = 1 << 13  # what a frame's decompressor is fed at once: it has no limit on what it gives back


@contextmanager
def open_plain(name: str) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed where its first bytes say so.

    Raises DataError when what is compressed is damaged or cut short, whenever that comes to light.
    """
    with open(name, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(_GZIP):
            try:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield cast(BinaryIO, io.BufferedReader(unpacked, _CHUNK_BYTES))
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise _damaged(name, "gzip", error) from None
        elif start == _ZSTANDARD:
            yield cast(BinaryIO, io.BufferedReader(_Zstandard(file, name), _CHUNK_BYTES))
        elif name.lower().endswith((".gz", ".zst")):
            raise DataError(f"{name} is not compressed, whatever its name says. Remove the ending {name[-4:]!r}.")
        else:
            yield file


def _damaged(name: str, kind: str, error: Exception) -> DataError:
    return DataError(f"{name} is a damaged {kind} file: {str(error).rstrip('.')}. Compress it anew.")


class _Zstandard(io.RawIOBase):
    """What a Zstandard file holds, frame after frame; the package's own reader takes a cut file for a whole one."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{name} is compressed with Zstandard, which needs a package: pip install 'weitiao[files]'"
            ) from None
        self._file = file
        self._name = name
        self._context = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._plain = b""
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(_PACKED_BYTES)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise _damaged(self._name, "Zstandard", EOFError("it ends in the middle"))
                return 0
            self._frame = self._frame or self._context.decompressobj()
            try:
                self._plain = self._frame.decompress(packed)
            except self._error as error:
                raise _damaged(self._name, "Zstandard", error) from None
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count
