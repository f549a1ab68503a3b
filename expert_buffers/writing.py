"""Writing an expert buffer: an expert's file first, then the sealed manifest, so that it is always valid."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.errors import ArtefactError, UsageError
from ddengine.locks import others
from expert_buffers.manifest import (
    FILE,
    IDENTITY,
    MANIFEST,
    PARTIAL,
    damaged,
    extent,
    read_manifest,
    require_regular,
    write_manifest,
)  # fmt: skip
from expert_buffers.trajectory import Recording, problem


def open_for_writing(root: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest to go on from: that of the buffer in `root`, or a new one without experts.

    Makes the folder and removes what a killed process left in it. UsageError when it holds another buffer,
    naming the first difference, or foreign files; ArtefactError when its manifest is damaged.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"out={root} is a file", "Choose another out=DIR")
    files.make_folder(root)
    names = set(others(root))
    ours = {name for name in names if name == MANIFEST or FILE.fullmatch(name) or PARTIAL.fullmatch(name)}
    if foreign := sorted(names - ours):
        raise UsageError(
            f"out={root} holds files that are not an expert buffer, such as {foreign[0]!r}",
            "Choose another out=DIR",
        )
    manifest = same_buffer(root, head) if MANIFEST in names else new_manifest(head)
    files.sweep(root)
    _clean(root, manifest["experts"])
    return manifest


def new_manifest(head: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a buffer without experts."""
    return {**head, "plan": {}, "experts": {}}


def same_buffer(root: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in `root`, refused (UsageError) when it is not that of `head`."""
    manifest = read_manifest(root)
    first = files.difference({k: manifest[k] for k in IDENTITY}, {k: head[k] for k in IDENTITY})
    if not first and manifest["architectures"] != head["architectures"]:
        first = "its networks have the same options and other parameters"
    if first:
        raise UsageError(f"out={root} holds another buffer: {first}", "Choose another out=DIR")
    return manifest


def _clean(root: Path, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove files of these experts that a longer recording has replaced."""
    for path in root.iterdir():
        found = FILE.fullmatch(path.name)
        entry = experts.get(str(int(found[1]))) if found else None
        if entry is not None and entry["file"] != path.name:
            path.unlink(missing_ok=True)


def save_expert(root: Path, number: int, architecture: str, recording: Recording) -> dict[str, Any]:
    """Write the file of expert `number` and return its manifest entry; `commit` makes it count.

    An expert that the manifest lists already, with fewer epochs, gets a file of another name, so that the
    old one stays valid until then.
    """
    name = f"expert_{number:05d}.safetensors"
    listed = read_manifest(root)["experts"].get(str(number)) if (root / MANIFEST).exists() else None
    if listed is not None:
        assert recording.epochs >= listed["checkpoints"], "only a longer recording replaces a committed one"
        name = f"expert_{number:05d}_e{recording.epochs:04d}.safetensors"
    written = files.write_tensors(root / name, recording.tensors())
    measured = len(recording.loss) > 0
    return {
        "file": name,
        "architecture": architecture,
        "checkpoints": recording.epochs + 1,
        "encoding": recording.encoding,
        **written,
        "loss": float(recording.loss[-1]) if measured else None,
        "accuracy": float(recording.accuracy[-1]) if measured else None,
    }


def commit(
    root: Path, manifest: Mapping[str, Any], number: int, entry: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the manifest with that expert and `plan` (what is recorded and why, plain JSON); return it."""
    experts = {**manifest["experts"], str(number): dict(entry)}
    ordered = dict(sorted(experts.items(), key=lambda item: int(item[0])))
    written = write_manifest(root, {**manifest, "plan": dict(plan), "experts": ordered})
    _clean(root, {str(number): entry})
    return written


def load_recording(root: Path, manifest: Mapping[str, Any], number: int) -> Recording:
    """The whole verified recording of expert `number`, to be continued (ArtefactError names its file)."""
    entry = manifest["experts"][str(number)]
    path = root / entry["file"]
    require_regular(path)
    found = files.read_tensors(path, entry)
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    if wrong := problem(declared, entry["encoding"], *extent(manifest, entry), entry["loss"] is not None):
        raise damaged(path, wrong)
    try:
        # Copies, for tensors read from a buffer may lie unaligned, on which a product's last bit can depend.
        return Recording.from_tensors({name: tensor.clone() for name, tensor in found.items()})
    except ArtefactError as error:
        raise damaged(path, error.cause) from error
