"""The user's own networks by import path, `my_package.my_module:MyNet`, from the working folder or installed.

A class or factory is called with those of its parameters that `MEANINGS` knows and, if it has a static
`defaults(shape)`, with the options named there; all others must have defaults. It gives a module whose
constructor draws and fills what it needs, seeded here.

Importing runs code. So only what a person gives is imported, by `import_network`; a path that a file names is
looked up among those, and refused where it is not there.
"""

import difflib
import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ddengine import origins
from ddengine.errors import UsageError, one_line
from ddengine.nets.core import Foreign, ForeignNetwork, NetSpec, lent

Shape = tuple[int, int, int]
MEANINGS: dict[str, Callable[[Shape, int], Any]] = {
    "shape": lambda shape, classes: shape,
    "classes": lambda shape, classes: classes,
    "num_classes": lambda shape, classes: classes,
    "in_channels": lambda shape, classes: shape[0],
    "channels": lambda shape, classes: shape[0],
    "in_chans": lambda shape, classes: shape[0],
    "image_size": lambda shape, classes: shape[1] if shape[1] == shape[2] else shape[1:],
    "img_size": lambda shape, classes: shape[1] if shape[1] == shape[2] else shape[1:],
}
UNDERSTOOD = "shape (c, h, w), classes, num_classes, in_channels, channels, in_chans, image_size, img_size"
_given: dict[str, tuple[Foreign, str]] = {}  # what a person gave in this process, and the folder it was in


def import_network(name: str, folder: str | Path | None = None) -> Foreign:
    """The network class that an import path which a person gave names; from now on `find_network` knows it.

    Modules are those installed, then those in `folder`, the working folder if None, so that a file there
    hides no package. The global generators end as they were. Raises UsageError for a path that is not one,
    a module that is not there or fails, and a name that it lacks or that is no class or factory.
    """
    if name in _given:
        return _given[name][0]
    place = str(Path.cwd() if folder is None else folder)
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), *attribute.split("."))):
        raise UsageError(f"'{name}' is not an import path", "Write MODULE:NAME, such as my_nets:MyNet")
    with lent(torch.Generator()), _numbers_too():
        found = _attribute(name, _module(name, path, place), attribute)
    wrong = problem(found)
    if wrong:
        raise UsageError(f"network '{name}' {wrong}", "Name what makes a fresh network")
    made = as_network(name, found)
    _given[name] = made, place
    return made


def problem(found: Any) -> str | None:
    """What keeps a value from making networks; None for a class or a factory."""
    if isinstance(found, nn.Module) or not callable(found):
        return f"is a {type(found).__name__}, neither a class nor a function"
    return None


def as_network(name: str, found: Callable[..., Any]) -> Foreign:
    """The network class called `name` of a foreign class or factory (see the head of this file)."""
    return Foreign(name, partial(_make, name, found), partial(_defaults, name, found), _refusal, True, False)


def find_imported(name: str) -> Foreign:
    """The network class of an import path that was given to `import_network` (else UsageError)."""
    if name not in _given:
        raise UsageError(
            f"network '{name}' is to be imported, which runs code, and you did not name it",
            f"Give network={name} yourself if you trust it (Python: ddengine.nets.import_network)",
        )
    return _given[name][0]


def folder_of(name: str) -> str | None:
    """The working folder when `name` was given to `import_network`; None where it was not."""
    return _given[name][1] if name in _given else None


def received(values: tuple[Any, ...], folder: str | None) -> NetSpec:
    """The spec that another process of ours sent, its network imported from `folder` if it was there."""
    if folder is not None:
        import_network(values[0], folder)
    return NetSpec(*values)


def _module(name: str, path: str, folder: str) -> ModuleType:
    if path == "__main__":
        raise UsageError(
            f"network '{name}' lies in the main program, where worker processes cannot find it",
            "Put it into a file of its own: my_nets:MyNet",
        )
    try:
        with _reachable(folder):
            return import_module(path)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
        said = f"there is no module '{path}'" if missing else f"it fails with {_said(error)}"
        raise UsageError(
            f"network '{name}' cannot be imported: {said}",
            f"It is looked for among the installed packages and in {folder}",
        ) from error


@contextmanager
def _reachable(folder: str) -> Iterator[None]:
    """Inside, imports look in `folder` last, and for our own packages in no other place than ours."""
    path, finders = list(sys.path), list(sys.meta_path)
    sys.path[:] = path if folder in path else [*path, folder]
    origins.pin()
    invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.meta_path[:] = path, finders


def _attribute(name: str, module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = sorted(
                key for key, value in getattr(found, "__dict__", {}).items() if _is_network(value, module)
            )
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise UsageError(
                f"network '{name}': there is no '{part}' in {module.__file__ or module.__name__}",
                f"{hint}There is: {', '.join(known) or 'no class and no function'}",
            )
        found = getattr(found, part)
    return found


def _is_network(value: Any, module: ModuleType) -> bool:
    """Whether a value in a module may make networks: a class or a function that is defined there."""
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__


def _defaults(name: str, found: Any, shape: Shape) -> dict[str, Any]:
    own = getattr(found, "defaults", None)
    options = {} if own is None else _tried(name, lambda: own(shape), "its defaults fail")
    if not isinstance(options, Mapping) or not set(options) <= {"width", "depth", "norm"}:
        raise UsageError(
            f"network '{name}' has the defaults {one_line(options)}",
            "Let defaults(shape) give a dict of width, depth and norm, or of some of them",
        )
    return dict(options)


def _make(name: str, found: Any, shape: Shape, classes: int, **options: Any) -> nn.Module:
    parameters = _tried(name, lambda: inspect.signature(found).parameters.values(), "it has no signature")
    given = dict(options)
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in given:
            continue
        if p.name in MEANINGS and p.kind is not p.POSITIONAL_ONLY:
            given[p.name] = MEANINGS[p.name](shape, classes)
        elif p.default is p.empty:
            raise UsageError(
                f"network '{name}' needs '{p.name}', which means nothing here",
                f"Give it a default; understood are {UNDERSTOOD}, and what defaults(shape) names",
            )
    net = _tried(name, lambda: found(**given), f"for images of {shape} and {classes} classes it fails")
    if not isinstance(net, nn.Module) or not any(True for _ in net.parameters()):
        raise UsageError(
            f"network '{name}' makes a {type(net).__name__} that is no module with weights",
            "Let it make a torch.nn.Module that has parameters",
        )
    return net


def _tried(name: str, call: Callable[[], Any], what: str) -> Any:
    """The result of foreign code, whose failure is one line."""
    try:
        with _numbers_too():
            return call()
    except (Exception, SystemExit) as error:
        raise UsageError(f"network '{name}': {what} ({_said(error)})", "Repair it") from error


def _refusal(net: ForeignNetwork, error: Exception) -> UsageError:
    return UsageError(
        f"network '{net.spec.name}' fails on two images of {net.shape}: {_said(error)}",
        "Repair it, or resize the images with dataset.size=PIXELS",
    )


def _said(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


@contextmanager
def _numbers_too() -> Iterator[None]:
    """Inside, numpy's and Python's global generators follow torch's, which is lent; they end as they were."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=4).digest()
    seed = int.from_bytes(digest, "little")
    before = random.getstate(), np.random.get_state()
    random.setstate(random.Random(seed).getstate())
    np.random.set_state(np.random.RandomState(seed).get_state())
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
