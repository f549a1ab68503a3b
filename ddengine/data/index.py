"""The index of a folder of images: what lies where in a dataset, found once and kept until a file changes.

Its making decodes every file once, a class at a time, and comes to the parts, order, statistics and
fingerprint that the same folder has in memory. It is kept under the hash of where the folder is and of what
is asked of it, with the names, sizes and times of its files, and is made anew where these differ.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ddengine import files
from ddengine.data.decode import attempt, check_size, none_readable, stacked, unreadable
from ddengine.data.disk import GROUP
from ddengine.data.levels import level_counts
from ddengine.data.split import TEST, VALIDATION, by_class_and_content, held_out, split
from ddengine.errors import ArtefactError, UsageError

FORMAT = 1
PARTS = ("fit", "validation", "test")


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files of the `classes` by part (train, val, test): each a path and a class number, in order.

    What is not there is split off `train`: `fractions` of it for test, and of what is left for validation.
    """

    root: str
    classes: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[str, int]]]
    fractions: tuple[float, float]

    @cached_property
    def flat(self) -> list[tuple[str, int, str]]:
        """(path, class, part) of all files, part after part."""
        return [(path, label, part) for part, entries in self.files.items() for path, label in entries]


@dataclass(frozen=True, eq=False)
class Index:
    """Places in the flat listing of each part's images in their final order, and what they are together.

    `skipped` are the places of unreadable files, `levels` [c 256] the grey levels of the fit part.
    """

    shape: tuple[int, int, int]
    parts: dict[str, Int64[Tensor, " _"]]
    skipped: Int64[Tensor, " s"]
    levels: Int64[Tensor, "c 256"]
    fingerprint: str


def index_folder() -> Path:
    """Where indices are kept: `index` in $DDENGINE_CACHE, else in `ddengine` of the user's cache."""
    if given := os.environ.get("DDENGINE_CACHE"):
        return Path(given).expanduser() / "index"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache") / "ddengine" / "index"


def find_index(listing: Listing, size: int | None, on_error: str) -> Index:
    """The index of the listed files at `size`: the kept one, or one made now and kept for the next time.

    Where it cannot be kept it is made each time. Raises UsageError for files that cannot be used.
    """
    root = str(Path(listing.root).absolute())
    means = (FORMAT, PIL.__version__, root, listing.classes, listing.fractions, size, on_error)
    path = index_folder() / f"{hashlib.sha256(repr(means).encode()).hexdigest()[:32]}.json"
    seen = _seen(listing)
    with suppress(ArtefactError):
        return _kept(path, seen)
    found = make_index(listing, size, on_error)
    with suppress(UsageError):
        _keep(path, seen, found)
    return found


def _seen(listing: Listing) -> str:
    """SHA-256 of the part, class, name, size and time of every file."""
    digest, start = hashlib.sha256(), len(listing.root)
    for path, label, part in listing.flat:
        with suppress(OSError):  # a link to nothing is an unreadable file
            found = os.stat(path)  # noqa: PTH116 a Path for each file takes five times as long
            digest.update(f"{found.st_size},{found.st_mtime_ns},".encode())
        digest.update(f"{part},{label},{path[start:]}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _kept(path: Path, seen: str) -> Index:
    """The index at `path` (ArtefactError where there is none of these files, or it is damaged)."""
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("files") != seen:
        raise ArtefactError(f"{path} is the index of other files", "Remove it")
    try:
        tensors = files.read_tensors(path.with_suffix(".safetensors"), found["tensors"])
        c, h, w = found["shape"]
        parts = {part: tensors[part] for part in PARTS}
        return Index((c, h, w), parts, tensors["skipped"], tensors["levels"], str(found["fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged", "Remove it") from error


def _keep(path: Path, seen: str, index: Index) -> None:
    files.make_folder(path.parent)
    files.sweep(path.parent)
    tensors = {**index.parts, "skipped": index.skipped, "levels": index.levels}
    entry = files.write_tensors(path.with_suffix(".safetensors"), tensors)
    shown = {"files": seen, "shape": list(index.shape), "fingerprint": index.fingerprint, "tensors": entry}
    files.write_json(path, shown)


def make_index(listing: Listing, size: int | None, on_error: str) -> Index:
    """Decode every listed file once: again only where one turns out unreadable, or coloured among grey ones.

    No more than two classes are in memory at a time. Raises UsageError as a load into memory would.
    """
    bad: set[int] = set()
    channels = 1
    while True:
        attempted = _Pass(listing, frozenset(bad), channels)
        for places, images in _classes(listing, size, bad):
            attempted.take(places, images, on_error)
        if attempted.whole:
            return attempted.index()
        bad, channels = bad | set(attempted.failed), attempted.channels


def _classes(
    listing: Listing, size: int | None, without: set[int]
) -> Iterator[tuple[list[int], list[np.ndarray | str]]]:
    """The places of each class in turn and what their files hold, the next class being decoded meanwhile."""
    flat = listing.flat
    places: list[list[int]] = [[] for _ in listing.classes]
    for place, (_, label, _) in enumerate(flat):
        if place not in without:
            places[label].append(place)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def begun(mine: list[int]) -> list[Future]:
        groups = (mine[start : start + GROUP] for start in range(0, len(mine), GROUP))
        return [pool.submit(lambda group: [attempt(flat[p][0], size) for p in group], g) for g in groups]

    try:
        coming = begun(places[0])
        for label, mine in enumerate(places):
            now, coming = coming, begun(places[label + 1]) if label + 1 < len(places) else []
            yield mine, [image for future in now for image in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


class _Pass:
    """One pass over all classes: hashes grow class by class, since the parts are sorted by class.

    What a hash says first, the shape and the labels, must be known by then: it follows from how many files
    there are, unless one is unreadable or the first of several colours.
    """

    def __init__(self, listing: Listing, bad: frozenset[int], channels: int) -> None:
        self.listing, self.bad, self.channels = listing, bad, channels
        self.flat = listing.flat
        self.failed: list[int] = []
        self.first: tuple[np.ndarray, str] | None = None
        self._opened = channels
        self.digests = {part: hashlib.sha256("\0".join(listing.classes).encode()) for part in PARTS}
        self.parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        self.levels = torch.zeros(0, 256, dtype=torch.int64)

    def take(self, places: list[int], images: list[np.ndarray | str], on_error: str) -> None:
        """Add a class: what its files hold, at their places in the listing."""
        for place, image in zip(places, images, strict=True):
            path = self.flat[place][0]
            if isinstance(image, str):
                if on_error != "skip":
                    raise unreadable(path, image)
                self.failed.append(place)
                continue
            if self.first is None:
                self.first = image, path
                self._open(image.shape)
            check_size(image, path, *self.first)
            self.channels = max(self.channels, len(image))
        if places and not self.failed and self.channels == self._opened:
            self._add(torch.tensor(places), stacked([i for i in images if not isinstance(i, str)]))

    @property
    def whole(self) -> bool:
        """Whether nothing came that was not foreseen."""
        return not self.failed and self.channels == self._opened

    def _open(self, shape: tuple[int, ...]) -> None:
        """Begin the hashes with what `types.fingerprint` says before the pixels."""
        self.channels = self._opened = max(self.channels, shape[0])
        self.shape = (self.channels, shape[1], shape[2])
        for part, counts in self._counts().items():
            y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            self.digests[part].update(f"{(tuple(y.shape), str(y.dtype))}".encode())
            self.digests[part].update(y.numpy().tobytes())
            self.digests[part].update(f"{((len(y), *self.shape), str(torch.uint8))}".encode())
        self.levels = torch.zeros(self.channels, 256, dtype=torch.int64)

    def _counts(self) -> dict[str, list[int]]:
        """Images of each class in each part."""
        given: dict[str, list[int]] = {}
        for part in self.listing.files:
            rows = [
                label for place, (_, label, p) in enumerate(self.flat) if p == part and place not in self.bad
            ]
            given[part] = np.bincount(np.array(rows, int), minlength=len(self.listing.classes)).tolist()
        fit, (test, validation) = given["train"], self.listing.fractions
        for part, fraction in (("test", test), ("val", validation)):
            if part not in given:
                given[part] = [held_out(n, fraction) for n in fit]
                fit = [n - out for n, out in zip(fit, given[part], strict=True)]
        return {"fit": fit, "validation": given["val"], "test": given["test"]}

    def _add(self, places: Tensor, x: UInt8[Tensor, "n c h w"]) -> None:
        x = x.expand(-1, self.channels, -1, -1)
        for part, rows in _divided(
            x, [self.flat[place][2] for place in places.tolist()], self.listing
        ).items():
            rows = rows[by_class_and_content(x[rows], torch.zeros_like(rows))]
            self.parts[part].append(places[rows])
            self.digests[part].update(x[rows].numpy().tobytes())
            if part == "fit" and len(rows):
                self.levels = self.levels + level_counts(x[rows])

    def index(self) -> Index:
        """The index, after the last class (UsageError where there was no image at all)."""
        if self.first is None:
            raise none_readable(len(self.flat))
        together = "".join(self.digests[part].hexdigest() for part in PARTS)
        return Index(
            self.shape,
            {part: torch.cat(rows) for part, rows in self.parts.items()},
            torch.tensor(sorted(self.bad), dtype=torch.int64),
            self.levels,
            hashlib.sha256(together.encode()).hexdigest(),
        )


def _divided(x: UInt8[Tensor, "n c h w"], given: list[str], listing: Listing) -> dict[str, Tensor]:
    """Rows of fit, validation and test images among those of one class, by the part that they lie in."""
    of = {part: torch.tensor([i for i, p in enumerate(given) if p == part]) for part in set(given)}
    none = torch.zeros(0, dtype=torch.long)
    fit, (test, validation) = of.get("train", none), listing.fractions
    for part, fraction, salt in (("test", test, TEST), ("val", validation, VALIDATION)):
        if part not in listing.files and len(fit):
            keep, out = split(x[fit], torch.zeros_like(fit), fraction, salt)
            fit, of[part] = fit[keep], fit[out]
    return {"fit": fit, "validation": of.get("val", none), "test": of.get("test", none)}
