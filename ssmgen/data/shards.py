"""Shards of a latent cache: safetensors files whose rows are read one by one.

Rows are read with ``pread``, not through a memory map: truncating a mapped file kills the process that reads it with
SIGBUS, whereas a short read is an error that names the file.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ssmgen.reading import open_regular, sha256_of

#: Prefix of the tensors beside latents and masks, and suffix of the tensor that says where the parts of another end.
EXTRA, ENDS = "extra.", ".ends"
#: What a shard can hold, by its name in safetensors.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64} | {
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 2**20  # bytes; the header of three tensors has some hundred


class CacheError(ValueError):
    """A latent cache is damaged, or was made from something else; the message names the file and the fix."""


class Shard:
    """One shard; the file is opened when the first row is read.

    Args:
        file: the safetensors file.
        size: its recorded size in bytes, or None.
        sha256: its recorded hash, or None.

    Attributes:
        count: number of rows, the same for all its tensors.

    Raises:
        CacheError: the file is missing, of another size, or does not hold tensors with equally many rows.
    """

    def __init__(self, file: Path, size: int | None = None, sha256: str | None = None) -> None:
        self.file, self.size, self.sha256 = file, size, sha256
        self._descriptor: int | None = None
        self._look()

    def verify(self) -> None:
        """Compare the file with its recorded hash.

        Raises:
            CacheError: it differs; names the file.
        """
        try:
            actual = sha256_of(self.file)
        except (OSError, ValueError) as error:
            raise CacheError(str(error)) from error
        if actual != self.sha256:
            raise CacheError(f"{self.file}: its SHA-256 is {actual[:8]}..., recorded is {str(self.sha256)[:8]}...")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors, rows first; without those that say where the parts of another end."""
        return {key: shape for key, (_, shape, _) in self._tensors.items() if not key.endswith(ENDS)}

    def row(self, key: str, index: int) -> Tensor:
        """Row ``index`` of a tensor ``(rows, ...)``, as ``(...)`` of any shape; the memory is its own.

        Where the shard has ``KEY.ends``, the row is that part of the tensor, ``(length, ...)``.

        Raises:
            CacheError: the file was truncated or changed after it was opened.
        """
        if key + ENDS not in self._tensors:
            return self._read(key, index, index + 1)[0]
        bounds = self._read(key + ENDS, max(index - 1, 0), index + 1).tolist()
        begin, end = bounds if index else (0, *bounds)
        if not 0 <= begin <= end <= self._tensors[key][1][0]:
            raise CacheError(f"{self.file}: part {index} of {key} lies outside it, from {begin} to {end}")
        return self._read(key, begin, end)

    def _read(self, key: str, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of a tensor."""
        rows = self._rows(key, begin, end)
        if rows is None:
            # The file was touched. Only other contents are a fault.
            self.close()
            self._look()
            if self.sha256 is not None:
                self.verify()
            rows = self._rows(key, begin, end)
        if rows is None:
            raise CacheError(f"{self.file}: is being changed while it is read")
        return rows

    def close(self) -> None:
        """Close the file; `row` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _look(self) -> None:
        """Read the header and remember the file's size, date and inode."""
        try:
            with open_regular(self.file) as stream:
                found = os.fstat(stream.fileno())
                if self.size not in (None, found.st_size):
                    raise ValueError(f"{self.file}: has {found.st_size:,} bytes, recorded are {self.size:,}")
                self._start, self._tensors = _header(self.file, stream, found.st_size)
        except (OSError, ValueError) as error:
            raise CacheError(str(error)) from error
        self._seen = _identity(found)
        parted = {key.removesuffix(ENDS) for key in self._tensors if key.endswith(ENDS)}
        counts = {shape[0] for key, (_, shape, _) in self._tensors.items() if key not in parted}
        if len(counts) != 1 or not parted <= self._tensors.keys():
            raise CacheError(f"{self.file}: its tensors have different numbers of rows, or there are none")
        self.count: int = counts.pop()

    def _rows(self, key: str, first: int, end: int) -> Tensor | None:
        """The rows, or None if the file is not the one that was looked at."""
        if self._descriptor is None:
            try:
                with open_regular(self.file) as stream:
                    self._descriptor = os.dup(stream.fileno())
            except (OSError, ValueError) as error:
                raise CacheError(str(error)) from error
        dtype, shape, begin = self._tensors[key]
        each = math.prod(shape[1:]) * dtype.itemsize
        buffer = bytearray((end - first) * each)
        read = _read_at(self._descriptor, buffer, self._start + begin + first * each)
        # After the data, so that a change before or during the reading is seen.
        if read != len(buffer) or _identity(os.fstat(self._descriptor)) != self._seen:
            return None
        whole = (end - first, *shape[1:])
        return torch.frombuffer(buffer, dtype=dtype).view(whole) if buffer else torch.empty(whole, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}  # each loader process opens its own

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_at(descriptor: int, buffer: bytearray, offset: int) -> int:
    """Fill a buffer from a file and return the number of bytes read, fewer only at the file's end."""
    if not hasattr(os, "preadv"):  # Windows, where no process inherits the position by a fork
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, len(buffer))
        buffer[: len(content)] = content
        return len(content)
    read = 0
    while read < len(buffer) and (more := os.preadv(descriptor, [memoryview(buffer)[read:]], offset + read)):
        read += more
    return read


def _header(file: Path, stream: BinaryIO, size: int) -> tuple[int, dict[str, tuple[torch.dtype, tuple[int, ...], int]]]:
    """Where a file's data begin; dtype, shape and offset from there of each tensor.

    Raises:
        ValueError: a damaged header, or one that does not fit the file; names it.
    """
    try:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(entry, size - 8 - length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: is not a shard, or its header is damaged ({error})") from error
    return 8 + length, tensors


def _tensor(entry: Any, size: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    # No rows at all are the parts of an extra that is empty in every example.
    if not shape or not all(type(n) is int and n >= (place > 0) for place, n in enumerate(shape)):
        raise ValueError(f"shape {shape}")
    if type(begin) is not int or not 0 <= begin <= size or end != begin + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"data from {begin} to {end}")
    if end > size:
        raise ValueError(f"data up to byte {end:,} of {size:,}")
    return dtype, shape, begin
