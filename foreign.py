"""Files that others wrote, read within bounds or refused: nothing is allocated for what a hostile one claims.

Pickles are no format here, so nothing in a file can run. What is checked: that a file is one, of its own directory; the
size of a JSON file, the number of its parts, names given twice; all that the header of a safetensors file says.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from options import UserError, shown

# DeepSeek-V3's own index has 9 MB and 91,991 names, the header of one of its shards 0.1 MB.
MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_PARTS = 400_000  # an empty list takes two bytes in a file and sixty in memory
MAX_HEADER_BYTES = 10 * 10**6
MAX_NAME = 256  # characters of a tensor's name
FILE_NAME = re.compile(  # plain on every system: no folder, nothing hidden, no device of Windows
    r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9_-])?"
)
BYTES_OF = {  # of a value of a safetensors dtype; those of less than a byte are not read
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or not what it says; the message names the file and the reason."""


def plain_file(path: Path) -> Path:
    """The path, if a file of its directory lies there: no pipe or device, no link to elsewhere.

    Hugging Face's cache is the exception: its snapshots are links into the blobs of the same repository.
    """
    try:
        real, home = path.resolve(strict=True), path.parent.resolve()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, links in a circle
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.with_name("blobs")
    if real.parent != home and not in_cache:
        raise CheckpointError(f"{path}: a link to {real}, outside of its directory; put the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path}: not a plain file")
    return path


def unreadable(path: Path, error: OSError) -> UserError:
    """What to raise for a file that cannot be read: CheckpointError where it is damaged or not there, else a UserError:
    a drive that is away, a lack of rights or descriptors says nothing about what was written."""
    gone = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)
    if error.errno in gone:
        return CheckpointError(f"{path}: {error.strerror}")
    return UserError(f"{path}: cannot be read now: {error.strerror}; see to it and start again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; CheckpointError names the file and what is wrong with it."""
    try:
        with open(plain_file(path), "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return json_object(path, content)


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is too large, or says anything but tensors that fill it without gaps."""
    with open(plain_file(path), "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read")
        content = file.read(header_bytes)
        if len(content) < header_bytes:
            raise CheckpointError(f"{path}: ends within its header of {header_bytes} bytes")
        header = json_object(path, content)
        num_bytes = os.fstat(file.fileno()).st_size - 8 - header_bytes
    header.pop("__metadata__", None)
    extents = []
    for name, entry in header.items():
        extent = _extent(entry)
        if extent is None or not 0 < len(name) <= MAX_NAME:
            raise CheckpointError(f"{path}: {shown(name)} is no tensor: {shown(entry)}")
        extents.append((*extent, name))
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            raise CheckpointError(f"{path}: {shown(name)} starts at byte {start}, the tensor before it ends at {end}")
        end = stop
    if end != num_bytes:
        raise CheckpointError(f"{path}: {num_bytes} bytes of tensors, its header says {end}")


def json_object(path: Path, content: bytes) -> dict[str, Any]:
    parts = sum(content.count(sign) for sign in (b",", b"[", b"{"))
    if parts > MAX_JSON_PARTS:
        raise CheckpointError(f"{path}: {parts} names and values, at most {MAX_JSON_PARTS} are read")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take two different ones of what is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} is given twice")
    return found


def _extent(entry: Any) -> tuple[int, int] | None:
    """Where a header's entry says that its tensor lies, if it is well-formed and shape and dtype agree."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 16:
        return None
    if any(type(number) is not int or not 0 <= number < 2**60 for number in (*shape, *offsets)):
        return None
    if not isinstance(dtype, str) or math.prod(shape) * BYTES_OF.get(dtype, -1) != offsets[1] - offsets[0]:
        return None
    return offsets[0], offsets[1]
