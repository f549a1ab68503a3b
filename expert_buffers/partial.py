"""The epochs of an unfinished expert, in a file that is believed only whole and only in its own buffer."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddengine import files
from expert_buffers.trajectory import Recording


def partial_path(root: Path, number: int) -> Path:
    """Where the epochs of an unfinished expert are kept."""
    return root / f"partial_{number:05d}.safetensors"


def save_partial(path: Path, recording: Recording, identity: str) -> None:
    """Write a recording with a digest of its content and of the buffer that it belongs to, atomically."""
    tensors = recording.tensors()
    files.write_tensors(path, {**tensors, "digest": _digest(tensors, identity)})


def load_partial(path: Path, identity: str) -> Recording | None:
    """The recording of a partial file; None where there is none, or it is damaged or of another buffer."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None
    digest = tensors.pop("digest", None)
    if digest is None or not torch.equal(digest, _digest(tensors, identity)):
        return None
    return Recording.from_tensors({name: tensor.clone() for name, tensor in tensors.items()})  # aligned


def _digest(tensors: Mapping[str, Tensor], identity: str) -> Tensor:
    digest = hashlib.sha256(identity.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
