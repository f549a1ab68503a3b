"""Export of distilled sets of images to what other tools read, saying what is lost."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ddengine import files
from ddengine.errors import UsageError, require
from ddengine.types import Images
from synth.compensated import Compensated
from synth.exported_files import Contents, write_npz, write_torch
from synth.exported_folders import write_hub, write_image_folder
from synth.factored import Factored
from synth.pixels import Pixels
from synth.store import DistilledSet
from synth.subset import Subset

TARGETS: dict[str, Callable[[Contents, Path], tuple[str, ...]]] = {
    "imagefolder": write_image_folder,
    "npz": write_npz,
    "torch": write_torch,
    "hf": write_hub,
}
SUFFIXES = {"npz": (".npz",), "torch": (".pt", ".pth")}
UNTOLD = "its evaluation recipe and how it was made are not in the file"


def export(distilled: DistilledSet, to: str, out: Path) -> tuple[str, ...]:
    """Write a set of images to `out` as `to`: "imagefolder", "npz", "torch" or "hf". Returns what is lost.

    npz and torch write one file, which must not exist, and lose nothing of images and labels; the others
    write a folder, which must be new or empty. Either appears as a whole or not at all. Of a compensated set
    its composites are written, of grids their cells in full size. Raises UsageError for sets of graphs and
    where `out` cannot be written.
    """
    require(to, TARGETS, "target")
    contents, notes = _contents(distilled)
    if to in SUFFIXES:
        _require_new_file(out, to)
        files.make_folder(out.parent)
        return (*notes, *TARGETS[to](contents, out), UNTOLD)
    with _appearing(out) as folder:
        lost = TARGETS[to](contents, folder)
    return (*notes, *lost, *(() if to == "hf" else (UNTOLD.replace("file", "folder"),)))


def _contents(distilled: DistilledSet) -> tuple[Contents, tuple[str, ...]]:
    synth = distilled.synth
    if not isinstance(synth, Pixels | Factored | Subset | Compensated):
        raise UsageError(f"a set of the kind '{synth.kind}' holds graphs", "Export a set of images")
    notes: tuple[str, ...] = ()
    if isinstance(synth, Compensated):
        teachers = f", without its {len(synth.teachers)} teachers" if synth.teachers else ""
        notes = (f"{synth.count} composites of {len(synth.bases)} bases are written out{teachers}",)
    if isinstance(synth, Factored):
        notes = (f"{synth.count} images decoded from {len(synth.images)} stored ones are written out",)
    if isinstance(synth, Subset):
        notes = ("which images of the source they are is not in it",)
    images = synth.decode()
    rate = None if isinstance(synth, Subset) else synth.student_lr
    detached = Images(_plain(images.x), _plain(images.y), images.spec, images.y_kind)
    return Contents(detached, rate, distilled.manifest), notes


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _require_new_file(out: Path, to: str) -> None:
    if out.suffix not in SUFFIXES[to]:
        raise UsageError(f"out={out} does not end as a {to} file does", f"Give out=NAME{SUFFIXES[to][0]}")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists", "Choose another name or remove it")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of the new or empty `folder` once all is written."""
    folder = folder.resolve()
    files.make_folder(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder", "Choose another folder")
    made = folder.parent / f"{files.TEMPORARY}{folder.name}.new"
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        yield made
        _sync(made)
        made.rename(folder)
        files.sync_folder(folder.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write {folder}: {error.strerror}", "Choose a writable folder with room for the set"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush all files of a folder to the disk."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
