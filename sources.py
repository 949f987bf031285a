"""Where documents come from: local files, Hub datasets, token shards, listed as units that can be sought.

`resolve` looks at every source once and returns a `Manifest`: small and plain. What cannot be sought (compressed text,
JSON arrays) is first turned into what can, in a cache.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import glob
import gzip
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import remote
import shards
from config import NAMED_SOURCES, SourceConfig, UserError
from documents import Manifest, Stream, Unit, byte_ranges, record_batches, row_groups

ROOT = Path(__file__).resolve().parent
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".txt")  # the last three also compressed
SPARE_BYTES = 1 << 30  # of a disk, left free when text is unpacked to it
CHUNK = 1 << 20  # what is unpacked at a time
MOST_LINE_BYTES = 64 << 20  # of a first line that is looked at
MOST_WINDOW_BYTES = 1 << 31  # that a .zst may ask for (zstd --long=31); its decoder's own limit is 128 MiB
MOST_OBJECT_CHARACTERS = 1 << 30  # of a value in a JSON array
REMEMBERED_BYTES = 64 << 20  # the digest of a file from this size on is kept, not made anew at every start
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")  # values of an array; a comma too many or too few does no harm
_ALLOWED = "".join(f"{suffix} " for suffix in SUFFIXES) + "(text and JSON also with .gz or .zst)"
_INSTEAD = "data.sources=FILE trains on a local file, --config quickstart on the text in this repository"


def resolve(sources: Sequence[SourceConfig], cache: str | None = None) -> Manifest:
    """List the units of `sources`. Raises UserError for what is missing, unreachable, empty or of an unknown kind.

    Args:
        cache: folder for what compressed files and JSON arrays hold, and for large files' digests; None: beside
            Hugging Face's caches.
    """
    found: list[Stream] = []
    identities: list[str] = []
    if not math.isfinite(sum(source.weight or 0 for source in sources)):
        raise UserError("data.sources: the weights' sum is no finite number; only their proportions matter")
    for number, source in enumerate(sources):
        try:
            streams, known = _resolve(number, source, cache)
        except OSError as error:  # what may not be read, a name that is too long
            if error.filename is None:
                raise
            raise UserError(f"data.sources: {error.filename}: {error.strerror}") from None
        except ValueError as error:  # a NUL in a path
            raise UserError(f"data.sources: {source.path!r}: {remote.one_line(error)}") from None
        if not any(stream.units for stream in streams):
            raise UserError(f"data.sources: {source.path!r} holds no documents")
        if len(streams) > 1 and (len(sources) > 1 or source.weight is not None or source.epochs is not None):
            raise UserError(
                f"data.sources: the shards in {source.path!r} are of several sources with weights of their own; "
                "they go with no other source, weight or epochs"
            )
        found += streams
        identities += known
    if sources[0].weight is None and len(found) == len(sources):
        names, units = tuple(source.path for source in sources), tuple(u for stream in found for u in stream.units)
        found = [Stream(names, units, 1.0, sources[0].epochs)]
    return Manifest(tuple(found), tuple(identities))


def _resolve(number: int, source: SourceConfig, cache: str | None) -> tuple[list[Stream], list[str]]:
    """The streams of a source, more than one only in a folder of shards, and what identifies its documents."""
    folder = Path(os.path.expanduser(source.path))
    if shards.is_folder(folder):
        return shards.resolve_folder(folder, source)
    files = _local_files(source.path)
    if files is not None and cache is not None:
        check_apart(source.path, cache, "data.cache")
    units, identity = _resolve_hub(source) if files is None else _resolve_local(source, files, cache)
    numbered = tuple(replace(unit, source=number) for unit in units) if number else tuple(units)
    stream = Stream((source.path,), numbered, source.weight or 1.0, source.epochs)
    return [stream], [json.dumps([source.text_field, identity])]


# ---- local files


def _local_files(path: str) -> list[Path] | None:
    """The files a source path names, sorted, or None where it is a Hub dataset's name.

    A relative path is looked for in the working directory, then in the repository.
    """
    path = os.path.expanduser(path)
    for place in (Path(path), ROOT / path):
        place = Path(os.path.abspath(place))  # keeps links: in the Hub's cache only the link has a suffix
        if place.is_file() and _suffix(place) not in SUFFIXES:
            raise UserError(f"data.sources: {path!r}: expected one of {_ALLOWED}")
        found = list(_files_below(place) if place.is_dir() else [place] if place.is_file() else _matches(place))
        files = [file for file in found if _suffix(file) in SUFFIXES and not file.is_dir()]
        if lost := [file for file in files if file.is_symlink() and not file.exists()]:
            raise UserError(f"data.sources: {lost[0]} is a link to what is not there")
        files = [file for file in files if file.is_file()]
        if files:
            return sorted(files, key=lambda file: file.as_posix())
        if place.is_dir():
            raise UserError(f"data.sources: folder {path!r} holds no file of {_ALLOWED}")
        if found:
            raise UserError(f"data.sources: {path!r} matches {found[0].name!r} and the like, but no file of {_ALLOWED}")
    near = _near_path(path)
    if near is None and _HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES + COMPRESSIONS):
        return None
    near = near or next(iter(difflib.get_close_matches(path, NAMED_SOURCES, n=1)), None)
    hint = f"; did you mean {near!r}?" if near else "; a Hub dataset is named owner/name"
    raise UserError(f"data.sources: {path!r}: no such file, folder or glob match{hint}")


def _matches(pattern: Path) -> Iterator[Path]:
    """What a glob names; below `**` as `_files_below` finds it, since links may lead in circles."""
    first = pattern.parts.index("**") if "**" in pattern.parts else len(pattern.parts)
    for top in map(Path, glob.glob(str(Path(*pattern.parts[:first])))):
        if first == len(pattern.parts):
            yield top
        else:
            files = _files_below(top)
            yield from (file for file in files if _fits(file.relative_to(top).parts, pattern.parts[first:]))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _files_below(folder: Path) -> Iterator[Path]:
    """What is in a folder and those below it; hidden ones are left out, links followed, each folder entered once."""
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # Links last: what they lead to keeps its own name, if it has one here.
        folders[:] = sorted(folders, key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        real = os.path.realpath(place)
        if real in entered or (Path(place) != folder and Path(place).name.startswith(".")):
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(place, name) for name in names if not name.startswith("."))


def check_apart(path: str, folder: str, key: str) -> None:
    """Raise UserError where source `path` would find what is written to `folder` at the next start."""
    top, recursive, _ = os.path.expanduser(path).partition("**")
    real = Path(os.path.realpath(os.path.expanduser(folder)))
    if not (recursive or os.path.isdir(top)) or not real.is_relative_to(os.path.realpath(top)):
        return
    if not any(part.startswith(".") for part in real.relative_to(os.path.realpath(top)).parts):  # hidden: not read
        raise UserError(
            f"{key} = {folder!r} lies in data.sources = {path!r}, which would read it; choose another place"
        )


def _suffix(file: Path) -> str:
    """What a file holds, in small letters; of a compressed one, what is inside."""
    suffix = file.suffix.lower()
    if suffix not in COMPRESSIONS:
        return suffix
    inner = Path(file.stem).suffix.lower()
    return inner if inner in (".jsonl", ".json", ".txt") else suffix


def _near_path(path: str) -> str | None:
    """An existing path whose last part resembles that of `path`."""
    for folder in (Path(path).parent, ROOT / Path(path).parent):
        siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(Path(path).name, siblings, n=1)
        if near:
            return Path(path).with_name(near[0]).as_posix()
    return None


def _resolve_local(source: SourceConfig, files: list[Path], cache: str | None) -> tuple[list[Unit], list[Any]]:
    lone_txt = sum(_suffix(file) == ".txt" for file in files) == 1
    top = os.path.commonpath([file.parent for file in files])
    units: list[Unit] = []
    identity: list[Any] = []
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda file: _digest(file, cache), files))
    for file, digest in zip(files, digests, strict=True):
        size, suffix = file.stat().st_size, _suffix(file)
        packed = _is_packed(file, suffix)
        origin = file.relative_to(top).as_posix()
        identity.append([origin, size, digest])
        if suffix == ".parquet":
            found = row_groups(str(file), size, source.text_field)
        elif suffix == ".arrow":
            found = record_batches(str(file), size, source.text_field)
        else:
            plain = plain_text(file, suffix, digest, cache) if packed else file
            found = _text_units(plain, suffix, source.text_field, str(file) if plain != file else "", lone_txt)
        units += [replace(unit, origin=origin) for unit in found]
    return units, identity


def _text_units(plain: Path, suffix: str, text_field: str, name: str, lone_txt: bool) -> list[Unit]:
    size = plain.stat().st_size
    if suffix != ".txt":
        _check_jsonl(plain, text_field, name or str(plain))
        return byte_ranges("jsonl", str(plain), size, text_field, name)
    _check_utf8(plain, name or str(plain))
    if lone_txt:
        return byte_ranges("blocks", str(plain), size, "", name)
    return [Unit("file", str(plain), 0, size, size, "", name)] if size else []


def _check_utf8(file: Path, name: str) -> None:
    """Refuse what is no UTF-8 text by its first MiB; a bad byte here and there is replaced."""
    with file.open("rb") as stream:
        start = stream.read(1 << 20)
    bad = start.decode("utf-8", errors="replace").count("\ufffd") + start.count(0)  # UTF-16 is half NULs
    if bad > 1 + len(start) / 1000:
        raise UserError(f"data.sources: {name}: no UTF-8 text ({bad} bad places in its first MiB); convert it first")


def _check_jsonl(file: Path, text_field: str, name: str) -> None:
    """Refuse a file whose first line tells that no line will do; a line that is no JSON at all may be one bad line."""
    with file.open("rb") as stream:
        line = stream.readline(MOST_LINE_BYTES)
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        if len(line) == MOST_LINE_BYTES:
            raise UserError(f"data.sources: {name}: its first line is over {MOST_LINE_BYTES >> 20} MiB long") from None
        return
    if not isinstance(first, dict):
        raise UserError(f"data.sources: {name}: expected one JSON object a line, found a {type(first).__name__}")
    if text_field not in first:
        raise UserError(f"data.sources: {name} has no key {text_field!r} (text_field); its keys: {', '.join(first)}")


def _digest(file: Path, cache: str | None) -> str:
    """Of all its bytes; of a large file they are read again only if its size or one of its times has changed."""
    found = file.stat()
    if found.st_size < REMEMBERED_BYTES:
        return _sha256(file)
    key = f"{file.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    kept = _cache_folder(cache) / f"{hashlib.sha256(key.encode()).hexdigest()}.sha256"
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", text := kept.read_text(encoding="ascii")):
            return text
    digest = _sha256(file)
    with contextlib.suppress(OSError):  # it is read again, then
        kept.parent.mkdir(parents=True, exist_ok=True)
        shards.write_file(kept, digest.encode())
    return digest


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _cache_folder(cache: str | None) -> Path:
    if cache is None:
        from huggingface_hub import constants

        return Path(constants.HF_HOME, "deepseek-plain")
    return Path(os.path.expanduser(cache), "plain-text")


# ---- what cannot be sought


def _is_packed(file: Path, suffix: str) -> bool:
    """Whether documents in it can only be reached through all that lies before them."""
    return _is_compressed(file) or (suffix == ".json" and not _is_json_lines(file))


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSIONS


def plain_text(file: Path, suffix: str, digest: str, cache: str | None) -> Path:
    """What a packed file holds, as text or JSON lines: written to the cache once, by the digest of all its bytes."""
    folder = _cache_folder(cache)
    target = folder / f"{digest}{suffix}"
    if target.is_file():
        return target.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"{folder} cannot be made ({error.strerror})"
        raise UserError(f"data.sources: {file}: no place for its text, {where}; see data.cache") from None
    shards.sweep(folder)
    mine = f"tmp-{os.getpid()}-{secrets.token_hex(4)}"  # machines that share the folder may have the same numbers
    unpacked, lines = (folder / f"{digest}.{kind}.{mine}" for kind in ("unpacked", "lines"))
    plain = file
    try:
        if _is_compressed(file):
            _write(unpacked, _decompressed(file), file)
            plain = unpacked
        if suffix == ".json" and not _is_json_lines(plain):
            _write(lines, _array_lines(plain, file), file)
            plain = lines
        plain.replace(target)
    finally:
        unpacked.unlink(missing_ok=True)
        lines.unlink(missing_ok=True)
    return target.absolute()


def _write(target: Path, blocks: Iterator[bytes], file: Path) -> None:
    """Write what `file` holds to the end of the disk's room at most: a few bytes may stand for any number."""
    full = UserError(f"data.sources: {file}: too little space for its text in {target.parent}; see data.cache")
    try:
        with target.open("wb") as out:
            unchecked = CHUNK
            for block in blocks:
                out.write(block)
                unchecked += len(block)
                if unchecked >= CHUNK and shutil.disk_usage(target.parent).free < SPARE_BYTES:
                    raise full
                unchecked %= CHUNK
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # a quota, which free space does not show
            raise full from None
        raise


def _decompressed(file: Path) -> Iterator[bytes]:
    opened: Any = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # noqa: SIM115  # closed below
    try:
        with opened as stream:
            if file.suffix.lower() == ".zst":
                yield from _frames(stream)
            else:
                while block := stream.read(CHUNK):
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.sources: {file} is damaged: {remote.one_line(error)}") from None


def _frames(stream: IO[bytes]) -> Iterator[bytes]:
    """What Zstandard's frames hold. A few bytes at a time: each may stand for thousands."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES)
    frame, begun = decompressor.decompressobj(), False
    try:
        while block := stream.read(1024):
            while block:
                yield frame.decompress(block)
                begun, block = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if begun:
        raise EOFError("it ends in the middle")


def _is_json_lines(file: Path) -> bool:
    """Whether the first line with anything in it is a JSON object of its own."""
    with file.open("rb") as stream:
        if stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return False  # an array may be a single line of any length
        stream.seek(0)
        for line in iter(lambda: stream.readline(64 << 20), b""):
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    return False
    return True


def _array_lines(file: Path, name: Path) -> Iterator[bytes]:
    """The values of a JSON array, one a line. Memory holds a few of them at a time."""
    decode = json.JSONDecoder().raw_decode
    # Bytes that are no UTF-8 become what the reader of lines refuses, and counts.
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        text = stream.read(max(CHUNK, 64)).lstrip()
        if not text.startswith("["):
            raise UserError(f"data.sources: {name}: neither an array of JSON objects nor JSON lines")
        at, number, more = 1, 0, True
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it always matches
            if text.startswith("]", at):
                break
            end, problem = at, ""
            try:
                _, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", "") or remote.one_line(error)
                # Complained of at the end of what is here; 16: `false` or an escape may have begun before it.
                cut = problem.startswith("Unterminated") or getattr(error, "pos", 0) > len(text) - 16
            else:
                cut = end > len(text) - 16  # a number may go on
            if cut and more and len(text) - at < MOST_OBJECT_CHARACTERS:
                block = stream.read(max(CHUNK, len(text) - at))
                text, at, more = text[at:] + block, 0, bool(block)
                continue
            if problem:
                raise UserError(f"data.sources: {name}: value {number} of its array cannot be read: {problem}")
            # As it was written: a line end in it is one between its tokens.
            yield text[at:end].replace("\n", " ").encode("utf-8", "surrogateescape") + b"\n"
            at, number = end, number + 1
        if (text[at + 1 :] + stream.read(CHUNK)).strip():
            raise UserError(f"data.sources: {name}: something follows its array; is it several?")


# ---- the Hub


def _resolve_hub(source: SourceConfig) -> tuple[list[Unit], list[Any]]:
    commit = remote.hub_commit("dataset", source.path, source.revision, instead=_INSTEAD)
    files = remote.dataset_files(source, commit, instead=_INSTEAD)
    names = [[name.split(commit, 1)[1], size] for name, size in files]
    if not all(name.endswith(".parquet") for name, _ in files):
        at = f"{source.path}@{commit}"
        units = [
            replace(unit, origin=f"{at}/{Path(path).name}")
            for path in remote.arrow_files(source, commit, instead=_INSTEAD)
            for unit in record_batches(path, Path(path).stat().st_size, source.text_field, at)
        ]
        return units, [source.path, commit, names, len(units)]

    def units_of(file: tuple[str, int]) -> list[Unit]:
        return remote.retry(lambda: row_groups(*file, source.text_field), file[0], seconds=30)

    with ThreadPoolExecutor(16) as pool:  # a footer is a few round trips, FineWeb-Edu has thousands of files
        units = [unit for found in pool.map(units_of, files) for unit in found]
    return units, [source.path, commit, names]
