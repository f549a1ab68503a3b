"""The published sets in torchvision's layouts: read in place, else fetched by torchvision."""

import contextlib
import hashlib
import http.client
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddengine.data.decode import resize
from ddengine.data.formats import Read, read_cifar, read_mnist, read_stl10, read_svhn
from ddengine.data.source import Part, Request, Source
from ddengine.errors import UsageError

TIMEOUT = 30.0  # seconds without a byte before a download is given up
MNIST_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published set: its files and their official MD5, how to read them, and the constants papers use.

    `kind` is the class in torchvision.datasets that downloads it, once for each of `splits` if there are any.
    """

    kind: str
    files: Mapping[str, str]
    read: Callable[[Path], Read]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""
    splits: tuple[str, ...] = ()


PUBLISHED = {
    "mnist": Published(
        "MNIST",
        {
            "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        lambda root: read_mnist(root / "MNIST" / "raw", MNIST_CLASSES),
        (0.1307,),
        (0.3081,),
    ),
    "fashion_mnist": Published(
        "FashionMNIST",
        {
            "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
        lambda root: read_mnist(root / "FashionMNIST" / "raw", FASHION_CLASSES),
        (0.2861,),
        (0.3530,),
        "MIT",
    ),
    "svhn": Published(
        "SVHN",
        {
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
        read_svhn,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        splits=("train", "test"),
    ),
    "cifar10": Published(
        "CIFAR10",
        {
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
            "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        lambda root: read_cifar(
            root / "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            ("batches.meta", "label_names"),
            "labels",
        ),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        "none stated",
    ),
    "cifar100": Published(
        "CIFAR100",
        {
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        },
        lambda root: read_cifar(
            root / "cifar-100-python", ("train",), "test", ("meta", "fine_label_names"), "fine_labels"
        ),
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "none stated",
    ),
    "stl10": Published(
        "STL10",
        {
            "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
            "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
            "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
            "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
        },
        lambda root: read_stl10(root / "stl10_binary"),
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        splits=("train",),
    ),
}


def load_published(request: Request) -> Source:
    """A published set from `root` (else the default root), downloaded if missing and allowed.

    Files with another checksum than the official one are read all the same, with a note. Raises UsageError
    naming the set and the place when it cannot be had, or the damaged file.
    """
    entry, root = PUBLISHED[request.name], request.default_root()
    if _missing(entry, root):
        _fetch(request.name, entry, root, request.download)
    try:
        train, test, classes = entry.read(root)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"dataset '{request.name}' at {root} is damaged: {error}",
            f"Restore its files or remove them, so that torchvision can download {entry.kind} again",
        ) from error
    return Source(
        classes,
        Part(resize(train.x, request.size), train.y),
        test=Part(resize(test.x, request.size), test.y),
        mean=entry.mean,
        std=entry.std,
        licence=entry.licence,
        notes=_checksum_notes(request.name, entry, root),
    )


def _missing(entry: Published, root: Path) -> list[str]:
    return [file for file in entry.files if not (root / file).is_file()]


def _fetch(name: str, entry: Published, root: Path, download: bool) -> None:
    reason = "downloading is switched off"
    if download:
        try:
            _download(entry, root)
            reason = "the download is incomplete"
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            tarfile.TarError,
            http.client.HTTPException,
        ) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"the download failed ({' '.join(lines)[:160]})"
    missing = _missing(entry, root)
    if missing:
        folder = str(Path(missing[0]).parent)
        place = root if folder == "." else root / folder
        raise UsageError(
            f"dataset '{name}' is not at {root} (looked for {missing[0]}): {reason}",
            f"Put the files of torchvision's {entry.kind} into {place}, or set dataset.root=DIR",
        )


def _download(entry: Published, root: Path) -> None:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, entry.kind)
    with _patient(), contextlib.redirect_stdout(sys.stderr):
        if not entry.splits:
            kind(root, download=True)
        for name in entry.splits:
            kind(root, split=name, download=True)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """A dead connection ends after TIMEOUT; torchvision itself sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _checksum_notes(name: str, entry: Published, root: Path) -> tuple[str, ...]:
    wrong = [file for file, official in entry.files.items() if _md5(root / file) != official]
    if not wrong:
        return ()
    note = (
        f"{len(wrong)} of {len(entry.files)} files of {name} are not the official ones "
        f"({wrong[0]} has another checksum): loaded as they are, with a fingerprint of their own"
    )
    return (note,)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
