"""Images that stay in their files: a tensor without pixels, whose rows are decoded when they are asked for.

`DiskPixels` stands where the pixels of `Images` stand. Indexing reads: the same draw gives the same bits as
from a set in memory. What would need all pixels at once is refused in one line.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, zip_longest
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ddengine.data.decode import attempt
from ddengine.errors import UsageError

HELD = 64 << 20  # bytes of decoded images that a process keeps, half of them decoded ahead
TAKEN = 1 << 30  # bytes up to which a chosen part of a set is read at once, and then lies in memory
GROUP = 16  # images that a thread decodes at a time: fewer cost as much in passing them on


class Reader:
    """Decodes files in threads; the last `held` bytes of images are kept, some of them ahead of their use.

    `shape` [c h w] is that of every image, `size` what they are scaled to (None: they have it). A copy of the
    process starts with nothing kept.
    """

    def __init__(
        self, paths: Sequence[str], shape: tuple[int, int, int], size: int | None, held: int = HELD
    ) -> None:
        self.paths, self.shape, self.size, self.held = paths, shape, size, held
        self._process = 0

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Reader, (self.paths, self.shape, self.size, self.held)

    def read(self, rows: Int64[np.ndarray, " m"]) -> UInt8[np.ndarray, "m c h w"]:
        """The images at `rows` of the paths, in that order; UsageError for one that is no longer readable."""
        self._start()
        out = np.empty((len(rows), *self.shape), dtype=np.uint8)
        with self._lock:
            blocks = np.array_split(rows, len(rows) // self._room(4) + 1)
            place = iter(out)
            for now, then in zip_longest(blocks, blocks[1:], fillvalue=rows[:0]):
                for row in filter(self._kept.__contains__, now.tolist()):
                    self._kept.move_to_end(row)  # else those that come now could push it out
                self._submit(now)
                self._submit(then)  # decoded while these are copied
                for row in now.tolist():
                    next(place)[:] = self._image(row)
            self._advance()
        return out

    def ahead(self, rows: Int64[np.ndarray, " m"]) -> None:
        """Begin to decode `rows`, which will be read in about that order, as far as there is room."""
        self._start()
        with self._lock:
            for row in [row for row, future in self._coming.items() if future.cancel()]:
                del self._coming[row]
            for row in [row for row, future in self._coming.items() if future.done()]:
                self._image(row, quiet=True)
            self._planned = iter(rows.tolist())
            self._advance()

    def _start(self) -> None:
        if self._process == os.getpid():
            return
        self._process, self._lock = os.getpid(), Lock()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._coming: dict[int, Future] = {}
        self._planned = iter(list[int]())

    def _room(self, share: int) -> int:
        """How many images fit in a `share`th of what is kept, at least one."""
        return max(1, self.held // (share * int(np.prod(self.shape))))

    def _submit(self, rows: np.ndarray) -> None:
        """Give the threads those of `rows` that are neither decoded nor on their way."""
        wanted = [row for row in dict.fromkeys(rows.tolist()) if not self._has(row)]
        for start in range(0, len(wanted), GROUP):
            group = tuple(wanted[start : start + GROUP])
            self._coming |= dict.fromkeys(group, self._pool.submit(self._decoded, group))

    def _has(self, row: int) -> bool:
        return row in self._kept or row in self._coming

    def _decoded(self, rows: tuple[int, ...]) -> dict[int, np.ndarray | str]:
        return {row: attempt(self.paths[row], self.size) for row in rows}

    def _advance(self) -> None:
        """Keep the threads busy with what was planned, within half of what may be kept."""
        free = self._room(2) - len(self._coming)
        missing = (row for row in self._planned if not self._has(row))
        self._submit(np.fromiter(islice(missing, max(0, free)), np.int64))

    def _image(self, row: int, quiet: bool = False) -> np.ndarray:
        """The decoded image at `row`, which is then the last to be forgotten."""
        if row in self._coming:
            self._kept[row] = self._coming.pop(row).result()[row]
        image = self._kept[row]
        wrong = isinstance(image, str) or image.shape[1:] != self.shape[1:] or len(image) > self.shape[0]
        if wrong:
            del self._kept[row]
            if quiet:
                return image
            reason = image if isinstance(image, str) else f"its shape is {image.shape}, not {self.shape}"
            raise UsageError(
                f"cannot read the image {self.paths[row]}: {reason}",
                "It changed since the command began: put it back, or repeat the command",
            )
        self._kept.move_to_end(row)
        while len(self._kept) > self._room(2):
            self._kept.popitem(last=False)
        return image


class DiskPixels(Tensor):
    """uint8 images [n c h w] that lie in the files of `reader`: image i is decoded from its path `rows[i]`.

    An index, a slice or a mask of images gives a plain tensor on the device. Whatever would read all images
    raises UsageError.
    """

    reader: Reader
    rows: np.ndarray

    @staticmethod
    def __new__(
        cls, reader: Reader, rows: Int64[np.ndarray, " n"], device: torch.device | str = "cpu"
    ) -> "DiskPixels":
        """A tensor of the shape and type of the images, with nothing in it."""
        shape = (len(rows), *reader.shape)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8, device=torch.device(device))
        made.reader, made.rows = reader, rows
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return DiskPixels, (self.reader, self.rows, str(self.device))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DiskPixels(shape={tuple(self.shape)}, device='{self.device}')"

    def ahead(self, index: Tensor) -> None:
        """Begin to decode the images at `index`, which will be read in about that order."""
        self.reader.ahead(self.rows[index.cpu().numpy()])

    def part(self, index: Tensor) -> Tensor:
        """The images at `index`: in memory, or on disk where they would take more than TAKEN bytes."""
        if len(index) * int(np.prod(self.reader.shape)) <= TAKEN:
            return self[index]
        return self.chosen(index)

    def chosen(self, index: Tensor) -> "DiskPixels":
        """The images at `index`, on disk, however few they are."""
        return DiskPixels(self.reader, self.rows[index.cpu().numpy()], self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func in HANDLERS:
            return HANDLERS[func](*args, **kwargs)
        if name == "__get__" or func in DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        given = [v if isinstance(v, list | tuple) else [v] for v in (*args, *kwargs.values())]
        raise refused(next(v for v in chain(*given) if isinstance(v, DiskPixels)), name)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} of images on disk")


def refused(pixels: DiskPixels, name: str) -> UsageError:
    """The error for an operation that would need all images at once."""
    n, size = len(pixels), pixels.numel()
    return UsageError(
        f"'{name}' needs all {n} images in memory ({size} bytes), and these are read from their files",
        "Give dataset.memory=ram where they fit, a smaller dataset.size, or leave out what needs them all",
    )


def _read(pixels: DiskPixels, index: Any) -> Tensor:
    """What `pixels[index]` gives; after a slice the next one as long is decoded ahead."""
    where = index.cpu().numpy() if isinstance(index, Tensor) else index
    if not isinstance(where, int | slice | list | np.ndarray):
        raise refused(pixels, f"[{index}]")
    rows = pixels.rows[where]
    single = rows.ndim == 0
    out = torch.from_numpy(pixels.reader.read(np.atleast_1d(rows)))
    if isinstance(index, slice) and len(rows):
        start, stop, step = index.indices(len(pixels))
        if step == 1 and stop < len(pixels):
            pixels.reader.ahead(pixels.rows[stop : 2 * stop - start])
    return (out[0] if single else out).to(pixels.device)


def _to(pixels: DiskPixels, *args: Any, **kwargs: Any) -> DiskPixels:
    device = kwargs.pop("device", args[0] if args else pixels.device)
    if len(args) > 1 or set(kwargs) - {"non_blocking"} or not isinstance(device, str | torch.device):
        raise refused(pixels, "to")
    return DiskPixels(pixels.reader, pixels.rows, device)


def _split(pixels: DiskPixels, size: int, dim: int = 0) -> Iterator[Tensor]:
    """The pieces one after another, each read when it is asked for."""
    if dim != 0:
        raise refused(pixels, "split")
    return (_read(pixels, slice(start, start + size)) for start in range(0, len(pixels), size))


def _empty(pixels: DiskPixels, **kwargs: Any) -> Tensor:
    return torch.empty(tuple(pixels.shape), **{"dtype": torch.uint8, "device": pixels.device, **kwargs})


DESCRIBING = (
    Tensor.size, Tensor.numel, Tensor.dim, Tensor.element_size, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel,
)  # fmt: skip
HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _read,
    Tensor.__repr__: DiskPixels.__repr__,
    Tensor.__deepcopy__: lambda pixels, memo: pixels,
    Tensor.to: _to,
    Tensor.cpu: lambda pixels: _to(pixels, "cpu"),
    Tensor.detach: lambda pixels: pixels,
    Tensor.split: _split,
    Tensor.share_memory_: lambda pixels: pixels,  # other processes read the files themselves
    torch.empty_like: _empty,
}
