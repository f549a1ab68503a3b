"""What is wrong with an installation: versions, devices, shipped configurations, foreign modules."""

import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ddengine import catalog, data, origins

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


class Finding(NamedTuple):
    """One line of `ddengine doctor`: `ok` is False where something must be mended."""

    name: str
    ok: bool
    value: str


def examine() -> list[Finding]:
    """Look at everything that the tool stands on."""
    return [
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        *(_package(name) for name in PACKAGES),
        _torchvision(),
        _device(),
        Finding("configurations", bool(catalog.configs()), str(catalog.folder())),
        *(Finding(f"module {name}", False, f"comes from {path}") for name, path in origins.foreign()),
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
