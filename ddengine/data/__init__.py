"""Real data: every dataset becomes class-sorted fit, validation and test parts that share one spec.

Images are uint8 pixels (`load`), graphs are label codes and edges (`load_graphs`). This module itself imports
neither torch nor numpy, so that datasets can be listed at once; its other names are fetched from their
modules on first use.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine import plugins
from ddengine.errors import unknown

if TYPE_CHECKING:
    from ddengine.data.graph_source import GRAPHS, GraphDataset, load_graphs, split_graphs
    from ddengine.data.registry import DATASETS, load
    from ddengine.data.source import Dataset, Part, Request, Source

__all__ = [
    "DATASETS",
    "DESCRIPTIONS",
    "GRAPHS",
    "GRAPH_COLLECTIONS",
    "Dataset",
    "GraphDataset",
    "Part",
    "Request",
    "Source",
    "dataset_root",
    "describe",
    "load",
    "load_graphs",
    "names",
    "split_graphs",
]

DESCRIPTIONS = {
    "digits": "1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn, needs no download",
    "mnist": "70,000 handwritten digits, 28x28 grey, 10 classes",
    "fashion_mnist": "70,000 photographs of clothes, 28x28 grey, 10 classes",
    "svhn": "99,289 house-number digits, 32x32 colour, 10 classes (without the extra part)",
    "cifar10": "60,000 natural images, 32x32 colour, 10 classes",
    "cifar100": "60,000 natural images, 32x32 colour, 100 classes",
    "stl10": "13,000 natural images, 96x96 colour, 10 classes (the labelled part)",
    "tiny_imagenet": "110,000 natural images, 64x64 colour, 200 classes; unpack it at dataset.root",
    "image_folder": "your own images: dataset.root=DIR of class folders, or of train/ test/ val/ of them",
    "npz": "your own arrays: dataset.root=FILE with x_train, y_train, x_test, y_test",
    "tu": "labelled graphs in TU text files, such as MUTAG, NCI1, PROTEINS: give dataset.name=NAME",
    "ogb": "labelled graphs in OGB csv files, such as ogbg-molbace: give dataset.name=NAME",
}
GRAPH_COLLECTIONS = ("tu", "ogb")  # of these a dataset is a collection's name and a set's name
_LAZY = {
    "DATASETS": "registry",
    "load": "registry",
    "Dataset": "source",
    "Part": "source",
    "Request": "source",
    "Source": "source",
    "GRAPHS": "graph_source",
    "GraphDataset": "graph_source",
    "load_graphs": "graph_source",
    "split_graphs": "graph_source",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def names() -> list[str]:
    """Names of all datasets: the built-in ones in their own order, then those of installed plug-ins."""
    return [*DESCRIPTIONS, *sorted({plugin.name for plugin in plugins.of("datasets")} - set(DESCRIPTIONS))]


def describe(name: str) -> str:
    """One line about the dataset `name`; for a plug-in, whose it is (UsageError if unknown)."""
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    plugin = plugins.find("datasets", name)
    if plugin is None:
        raise unknown("dataset", name, names())
    return f"plug-in of {plugin.origin}: {plugin.description}"


def dataset_root() -> Path:
    """Where datasets are looked for by default: $DDENGINE_DATA, else `ddengine` in the user's cache."""
    if given := os.environ.get("DDENGINE_DATA"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "ddengine"
