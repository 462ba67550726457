"""Files on this machine's disks, whole under their names or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ATTEMPTS = 8
COPY_BYTES = 8 * 2**20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def is_temporary(path: str) -> bool:
    """Whether this is what a put to a local disk writes before the file has its name; left by one that died."""
    return bool(_TEMPORARY.fullmatch(path.rpartition("/")[2]))


def put(target: str, data: bytes | Path, place: Callable[[str, str], None]) -> None:
    """Bytes or a file under the target's name, by `place` (os.replace, or os.link for a name that must be new).

    Again where the folder went: another attempt may be clearing it. Raises: FileNotFoundError if `data` is gone.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            return _put_once(target, data, place)
        except FileNotFoundError:
            if not left or (isinstance(data, Path) and not data.exists()):
                raise


def _put_once(target: str, data: bytes | Path, place: Callable[[str, str], None]) -> None:
    """Writes beside the target under a dotted name, which no reader takes for a part, then `place`s it."""
    folder, name = os.path.split(target)
    _make_folder(folder)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file, COPY_BYTES)
            # Else a machine that loses its power may keep the name and lose the bytes.
            file.flush()
            os.fsync(file.fileno())
        place(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _make_folder(folder: str) -> None:
    """Raises: FileNotFoundError where it goes while it is made, NotADirectoryError where a file has its name."""
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        kind = NotADirectoryError if Path(folder).is_file() else FileNotFoundError
        raise kind(errno.ENOENT, "No such folder", folder) from None
