"""What is wrong with an installation: versions, devices, shipped configurations, foreign modules."""

import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ddengine import catalog, data, origins, plugins
from ddengine.errors import UsageError

PACKAGES = (
    "torch",
    "torchvision",
    "kornia",
    "higher",
    "numpy",
    "scipy",
    "hydra-core",
    "safetensors",
    "rich",
    "scikit-learn",
    "matplotlib",
    "jaxtyping",
    "pillow",
)

FINDERS = {  # by module, for this one imports none of them
    "matchers": ("matchers", "find"),
    "networks": ("ddengine.nets", "find_network"),
    "datasets": ("ddengine.data.registry", "find"),
}


class Finding(NamedTuple):
    """One line of `ddengine doctor`: `ok` is False where something must be mended.

    A `warning` is of what does not work and that nothing of ours needs.
    """

    name: str
    ok: bool
    value: str
    warning: bool = False


def examine() -> list[Finding]:
    """Look at everything that the tool stands on."""
    return [
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        *(_package(name) for name in PACKAGES),
        _torchvision(),
        _device(),
        Finding("configurations", bool(catalog.configs()), str(catalog.folder())),
        *(Finding(f"module {name}", False, f"comes from {path}") for name, path in origins.foreign()),
        *_plugins(),
        Finding("datasets", True, f"looked for in {data.dataset_root()}"),
        Finding("C++ compiler", True, shutil.which("c++") or "none (compiled steps are not available)"),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"is not installed; run: pip install {name}")


def _torchvision() -> Finding:
    try:
        import_module("torch")
    except Exception as error:
        return Finding("torchvision fits torch", False, f"torch does not load: {plugins.said(error)}")
    try:
        import_module("torchvision.ops")  # its compiled part fails here when it does not fit torch
    except Exception as error:
        cause = " ".join(str(error).split())
        return Finding("torchvision fits torch", False, f"{cause}; install a matching pair of the two")
    return Finding("torchvision fits torch", True, "yes")


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("device", False, f"torch does not load: {' '.join(str(error).split())}")
    if not torch.cuda.is_available():
        return Finding("device", True, f"cpu, {torch.get_num_threads()} threads (no CUDA device)")
    return Finding("device", True, f"cuda, {torch.cuda.get_device_name(0)}")


def _plugins() -> list[Finding]:
    """One line for each plug-in, which is imported, and for each distribution that cannot be read."""
    found = [_plugin(plugin) for kind in plugins.GROUPS for plugin in plugins.of(kind)]
    return [*found, *(Finding("plug-in", True, text, warning=True) for text in plugins.damaged())]


def _plugin(plugin: plugins.Plugin) -> Finding:
    name = f"plug-in {plugin.kind[:-1]} {plugin.name}"
    if plugin.name in catalog.KINDS[plugin.kind]:
        hidden = f"{plugin.origin} gives it a name of ours, which hides it; rename its entry point"
        return Finding(name, True, hidden, warning=True)
    try:
        _found(plugin)
    except Exception as error:
        cause = error.cause if isinstance(error, UsageError) else plugins.said(error)
        return Finding(name, True, cause, warning=True)
    return Finding(name, True, f"{plugin.origin}, {plugin.value}")


def _found(plugin: plugins.Plugin) -> None:
    """Find a plug-in as the commands do; what they import may itself be missing here."""
    module, function = FINDERS[plugin.kind]
    getattr(import_module(module), function)(plugin.name)
