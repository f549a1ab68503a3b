"""A folder that takes the place of another as a whole: readers see the old one or the new one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ddengine import files
from ddengine.errors import ArtefactError, DDError, UsageError
from ddengine.locks import alone

ENDINGS = ("new", "old", "lock")  # of the temporary names beside the folder

T = TypeVar("T")


@contextmanager
def replacing(folder: Path, nbytes: int) -> Iterator[Path]:
    """A path where the block makes the folder that takes the place of `folder`, once it is whole.

    When the block fails, `folder` is as it was. One process at a time replaces a folder. Raises UsageError
    when the system refuses; `nbytes` is what its message says that is needed.
    """
    files.make_folder(folder.parent)
    new, old, lock = (folder.parent / f"{files.TEMPORARY}{folder.name}.{end}" for end in ENDINGS)
    with files.refused(f"write {folder}", nbytes), alone(lock, str(folder)):
        try:
            _restore(folder, old)
            for left_over in (new, old):
                shutil.rmtree(left_over, ignore_errors=True)
            yield new
            _swap(folder, new, old)
        except OSError:
            _restore(folder, old)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _swap(folder: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, at one stroke where the system can exchange two names.

    Elsewhere `old` holds what was there until it is done.
    """
    files.sync_folder(new)
    if not (folder.exists() and files.exchange(new, folder)):
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    files.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _restore(folder: Path, old: Path) -> None:
    """Undo a swap that was cut off between its two renames."""
    if old.exists() and not folder.exists():
        old.rename(folder)


def settled(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of `folder`, again for as long as another process has replaced it meanwhile.

    The open handle keeps the number of a folder that is gone from being given to the next one. Raises
    UsageError where there is no such folder.
    """
    while True:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UsageError(f"there is no folder {folder}", "Give the folder of a distilled set") from error
        except NotADirectoryError:
            return read()  # which says what is wrong
        except OSError as error:
            raise ArtefactError(f"cannot read {folder}: {error.strerror}", "Give a folder to read") from error
        try:
            return read()
        except DDError:
            if not folder.exists() or os.path.samestat(os.fstat(handle), folder.stat()):
                raise
        finally:
            os.close(handle)
