"""LibriSpeech from OpenSLR or a mirror: resumed, verified, unpacked; a part is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from w2v2.data import storage
from w2v2.errors import Show, UsageError, quiet
from w2v2.files import read_text

OFFICIAL = "https://www.openslr.org/resources"
BLOCK = 8 * 2**20
"""Bytes asked for at a time, so the most that an interruption costs."""
_SPACE = 2.1
"""Archive and what it unpacks to, which is hardly larger, as multiples of the archive."""
_MARKER = ".complete"


class Part(NamedTuple):
    """Where OpenSLR keeps an archive, and the MD5 that its md5sum.txt publishes."""

    resource: int
    md5: str


PARTS = {
    "dev-clean": Part(12, "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": Part(12, "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": Part(12, "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": Part(12, "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": Part(12, "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": Part(12, "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": Part(12, "d1a0fd59409feb2c614ce4d30c387708"),
    "dev-clean-2": Part(31, "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-5": Part(31, "5df7d4e78065366204ca6845bb08f490"),
}
"""LibriSpeech (OpenSLR 12; Panayotov et al. 2015) and Mini LibriSpeech (OpenSLR 31)."""


def download_librispeech(
    parts: Sequence[str],
    folder: Path,
    *,
    base_url: str = OFFICIAL,
    checksums: Path | None = None,
    show: Show = quiet,
) -> Path:
    """Download and unpack parts of LibriSpeech; whatever ends it, the next call goes on from there.

    Args:
        parts: names from ``PARTS``.
        folder: ``FOLDER/PART.tar.gz`` while it lasts, ``FOLDER/LibriSpeech/PART`` in the end. An archive or a
            ``.partial`` one that is already there is used.
        base_url: any location ``storage`` reads, with the archives in ``12/`` and ``31/``, or all side by side.
        checksums: file of lines ``MD5  NAME`` to verify archives by. Without: ``md5sum.txt`` of a mirror, if it has
            one, else what OpenSLR published.
        show: told the share done, by the bytes of archives fetched and unpacked.

    Returns:
        The folder to prepare, ``FOLDER/LibriSpeech``.

    Raises:
        UsageError: an unknown part; a part already there but not by this function; a checksum not listed in
            ``checksums``; an archive whose members would leave the folder, or which lacks the part.
        OSError: what ``storage`` raises; too little space; a wrong checksum or a broken archive, which is removed.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part {', '.join(unknown)} of LibriSpeech; expected some of {', '.join(PARTS)}")
    archives = {part: folder / f"{part}.tar.gz" for part in dict.fromkeys(parts)}
    target = folder / "LibriSpeech"
    for part in [part for part in archives if _is_there(archives[part], target / part)]:
        del archives[part]
    # All of this for all parts before the first is fetched, so that a missing one shows now rather than in an hour.
    sums = {part: _checksum(part, base_url, checksums) for part in archives}
    folder.mkdir(parents=True, exist_ok=True)
    sources = {part: _locate(part, base_url, archive) for part, archive in archives.items()}
    total, done = 2 * sum(size for _, size in sources.values()), 0
    for part, archive in archives.items():
        url, size = sources[part]

        def report(count: int, before: int = done) -> None:
            show("download", (before + count) / total)

        shutil.rmtree(_unpacking(archive), ignore_errors=True)
        _check_space(archive, size)
        if not archive.exists():
            _fetch(url, size, archive, report)
        _verify(archive, sums[part])
        _unpack(archive, part, target, report)
        done += 2 * size
    show("download", 1.0)
    return target


def _is_there(archive: Path, folder: Path) -> bool:
    """Whether a part is; what outlasts it, if the process was killed just after it was moved in place, is removed."""
    if (folder / _MARKER).exists():
        archive.unlink(missing_ok=True)
        shutil.rmtree(_unpacking(archive), ignore_errors=True)
        return True
    if folder.exists():
        raise UsageError(f"{folder} was not unpacked by w2v2, or not wholly; move it away, or choose a folder")
    return False


def _locate(part: str, base_url: str, archive: Path) -> tuple[str, int]:
    """Location and size of an archive, which may be here already."""
    if archive.exists():
        return str(archive), archive.stat().st_size
    url, flat = storage.join(base_url, str(PARTS[part].resource), archive.name), storage.join(base_url, archive.name)
    try:
        return url, storage.size_of(url)
    # Buckets that may not be listed answer 403 for what they lack.
    except (FileNotFoundError, PermissionError) as error:
        try:
            return flat, storage.size_of(flat)
        except (FileNotFoundError, PermissionError):
            raise type(error)(f"{error}; nor is there {flat}") from error


def _partial(archive: Path) -> Path:
    return archive.with_name(archive.name + ".partial")


def _unpacking(archive: Path) -> Path:
    return archive.with_name(archive.name.removesuffix(".tar.gz") + ".unpacking")


def _check_space(archive: Path, size: int) -> None:
    have = sum(path.stat().st_size for path in (archive, _partial(archive)) if path.exists())
    needed, free = int(_SPACE * size) - have, shutil.disk_usage(archive.parent).free
    if free < needed:
        raise OSError(
            f"too little space in {archive.parent} for {archive.name}: expected {needed / 1e9:.2f} GB to download and "
            f"unpack it, got {free / 1e9:.2f} GB; free some, or choose another folder"
        )


def _fetch(url: str, size: int, archive: Path, report: Callable[[int], None]) -> None:
    partial = _partial(archive)
    # Not to append: two processes that were started by mistake write the same bytes to the same place.
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        done = file.seek(0, os.SEEK_END)
        if done > size:
            done = file.truncate(file.seek(0))
        report(done)
        while done < size:
            block = storage.read_range(url, done, min(BLOCK, size - done))
            file.write(block)
            file.flush()
            done += len(block)
            report(done)
    partial.rename(archive)


def _listed(text: str, name: str) -> str | None:
    """The MD5 that a text in md5sum's format gives for a file name, in whichever folder."""
    for line in text.splitlines():
        match = re.fullmatch(r"\\?([0-9a-fA-F]{32})\s+\*?(.*\S)\s*", line)
        if match and PurePosixPath(match[2]).name == name:
            return match[1].lower()
    return None


def _checksum(part: str, base_url: str, checksums: Path | None) -> str:
    name = f"{part}.tar.gz"
    if checksums is not None:
        if not checksums.is_file():
            raise UsageError(f"no file {checksums} of checksums; expected lines 'MD5  NAME' in it")
        if md5 := _listed(read_text(checksums), name):
            return md5
        raise UsageError(f"{checksums} lists no MD5 for {name}; expected a line 'MD5  {name}'; add it")
    if base_url.rstrip("/") != OFFICIAL:
        for place in (storage.join(base_url, str(PARTS[part].resource)), base_url):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                text = storage.read_bytes(storage.join(place, "md5sum.txt")).decode(errors="replace")
                if md5 := _listed(text, name):
                    return md5
    return PARTS[part].md5


def _verify(archive: Path, md5: str) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != md5:
        archive.unlink()
        raise OSError(f"{archive} is broken: expected MD5 {md5}, got {digest}; it is removed, download it again")


def _unpack(archive: Path, part: str, target: Path, report: Callable[[int], None]) -> None:
    """Unpack beside the target and move there in one step, marker included, so that no half of a part is ever there."""
    unpacking, size = _unpacking(archive), archive.stat().st_size
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
            for member in tar:
                _check_member(archive, member)
                tar.extract(member, unpacking, filter="data")
                report(size + file.tell())
        unpacked = unpacking / "LibriSpeech"
        if not (unpacked / part).is_dir():
            raise UsageError(f"{archive} holds no folder LibriSpeech/{part}; it is removed, check where it is from")
        (unpacked / part / _MARKER).touch()
        target.mkdir(exist_ok=True)
        for path in unpacked.iterdir():
            if path.is_file():
                path.replace(target / path.name)
        (unpacked / part).rename(target / part)
        archive.unlink()
    except UsageError:
        archive.unlink()
        raise
    except (tarfile.TarError, EOFError, zlib.error) as error:
        archive.unlink()
        raise OSError(f"{archive} is broken: {error or 'it ends early'}; it is removed, download it again") from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    """LibriSpeech has no links; refusing all of them spares us the ways there have been around the filter 'data'."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
        kind = "a link or special file" if not (member.isfile() or member.isdir()) else "outside the folder"
        raise UsageError(
            f"{archive} holds {member.name!r}, {kind}: expected only files and folders within it; "
            "it is removed, download it from a place that you trust"
        )
