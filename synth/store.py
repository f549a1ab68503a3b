"""The distilled set on disk: stored tensors and a sealed manifest, verified whenever they are read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddengine import files
from ddengine.composites import Composites
from ddengine.errors import ArtefactError, UsageError
from ddengine.graphs import Graphs
from ddengine.ops.dag import Trees
from ddengine.types import Images, SynthSet
from synth import schema
from synth.card import data_card
from synth.compensated import Compensated
from synth.composite_sheet import composite_sheet
from synth.described import dataset_fields, form_tensors, pack_whitening, spec_of, spec_problem
from synth.forms import FORMS, Form, images_per_class, items_text, own_fields, stored_count, tensors_problem
from synth.graph_card import graph_card
from synth.replacing import replacing, settled
from synth.schema import DATA, MANIFEST, damaged
from synth.sheet import contact_sheet
from synth.teachers import build_teachers

CARD, PREVIEW = "README.md", "preview.png"
OURS = {DATA, CARD, PREVIEW, MANIFEST}


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """A synthetic set in stored form: `tensors` as they lie in data.safetensors, and what the manifest says.

    What it decodes to is the same bit for bit before saving and after loading. `manifest` has "files" and
    "seal" only once it was read from disk.
    """

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]

    @staticmethod
    def make(synth: SynthSet, *, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> "DistilledSet":
        """Pack `synth`; `recipe` is how to evaluate it, `provenance` how it was made (plain JSON values).

        Raises UsageError for a set that is empty or not finite, has labels out of range, or no known form.
        """
        if not isinstance(synth, Form):
            raise UsageError(
                f"a {type(synth).__name__} has no stored form", f"Give one of the forms {', '.join(FORMS)}"
            )
        tensors = {name: t.contiguous() for name, t in (synth.pack() | pack_whitening(synth.spec)).items()}
        dataset = dataset_fields(synth.spec)
        fields = {"kind": synth.kind, "dataset": dataset, "y_kind": synth.y_kind, **own_fields(synth)}
        wrong = schema.dataset_problem(dataset, synth.kind)
        if wrong := wrong or _tensors_problem(tensors, fields):
            raise UsageError(f"this set cannot be stored: {wrong}", "Give finite data and labels in range")
        declared = {name: schema.declare(t) for name, t in sorted(tensors.items())}
        manifest = {
            "format": schema.FORMAT,
            "version": schema.VERSION,
            **fields,
            "tensors": declared,
            "count": stored_count(tensors, fields),
            "budget": {**schema.part_bytes(declared, synth.kind), "ipc": images_per_class(synth, provenance)},
            "recipe": _plain("recipe", recipe),
            "provenance": _plain("provenance", provenance),
        }
        return DistilledSet(tensors, manifest)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write data, card, preview and, last, the manifest; the folder appears as a whole. Returns it.

        A folder that holds the same set (but for provenance) is replaced. One that holds another set is
        replaced only with `overwrite`, one that holds other files never (UsageError).
        """
        folder = Path(folder).resolve()
        size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        with replacing(folder, size) as new:
            self._require_replaceable(folder, overwrite)
            new.mkdir()
            self._write(new)
        return folder

    @staticmethod
    def load(folder: str | Path, verify: bool = True) -> "DistilledSet":
        """Read a set. Manifest and data are always checked; `verify` also checks the card and the preview.

        A set that is replaced meanwhile is read again: what comes back is the old one or the new one. Raises
        ArtefactError naming the file for any damage, UsageError when there is no such folder.
        """
        return settled(Path(folder), lambda: DistilledSet._read(Path(folder), verify))

    @staticmethod
    def _read(folder: Path, verify: bool) -> "DistilledSet":
        manifest = schema.read_manifest(folder)
        if manifest["kind"] not in FORMS:
            raise ArtefactError(
                f"{folder / MANIFEST} names the unknown kind {manifest['kind']!r}", "Upgrade ddengine"
            )
        tensors = _read_data(folder / DATA, manifest)
        if wrong := _stored_problem(tensors, manifest):
            raise damaged(folder / DATA, wrong)
        for name, entry in manifest["files"].items():
            if verify and name != DATA:
                _require_file(folder / name, entry)
        return DistilledSet(tensors, manifest)

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Any:
        """All, or the items at `indices`: Images in model-input space (float32), or Trees, or Graphs."""
        return self.synth.decode(indices)

    def composites(self) -> Composites | None:
        """The training images of a compensated set, made when asked for; None for any other kind."""
        synth = self.synth
        return synth.composites() if isinstance(synth, Compensated) else None

    def teachers(self) -> list[nn.Module]:
        """The networks that come with the set, in eval mode; none for most sets.

        Raises ArtefactError when the manifest's recipe and the stored vectors disagree.
        """
        synth = self.synth
        stored = synth.teachers if isinstance(synth, Compensated) else ()
        return build_teachers(self.manifest["recipe"].get("teachers", []), stored, self.spec)

    @property
    def synth(self) -> Form:
        """The set in its form, for example to go on distilling it."""
        return FORMS[self.kind].unpack(self.tensors, self.manifest, self.spec)

    @property
    def spec(self) -> Any:
        """What the data means: a DataSpec with its whitening, or a GraphSpec with its codebooks."""
        return spec_of(self.manifest["dataset"], self.tensors)

    @property
    def kind(self) -> str:
        """The stored form, a key of FORMS."""
        return self.manifest["kind"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(self.manifest["dataset"]["classes"])

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the tensors by part, and their total (whitening matrices apart)."""
        return {part: self.manifest["budget"][part] for part in (*schema.parts(self.kind), "total")}

    def _require_replaceable(self, folder: Path, overwrite: bool) -> None:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if foreign := names - OURS:
            raise UsageError(f"{folder} holds other files, such as {min(foreign)!r}", "Choose another folder")
        if names and not overwrite and not self._same_as(folder):
            raise UsageError(
                f"{folder} holds another distilled set", "Choose another folder, or pass overwrite=True"
            )

    def _same_as(self, folder: Path) -> bool:
        try:
            other = DistilledSet.load(folder)
        except ArtefactError:
            return False
        mine, theirs = ({**s.manifest, "files": 0, "seal": 0, "provenance": 0} for s in (self, other))
        return mine == theirs and all(torch.equal(t, other.tensors[name]) for name, t in self.tensors.items())

    def _write(self, folder: Path) -> None:
        entries = {DATA: files.write_tensors(folder / DATA, self.tensors)}
        card = self._describe(folder / PREVIEW, entries)
        files.write_bytes(folder / CARD, card.encode())
        for name in (CARD, PREVIEW):
            entries[name] = {"sha256": files.sha256(folder / name), "bytes": (folder / name).stat().st_size}
        manifest = {**self.manifest, "files": entries}
        files.write_json(folder / MANIFEST, {**manifest, "seal": schema.seal(manifest)})

    def _describe(self, preview: Path, entries: Mapping[str, Any]) -> str:
        """Draw the preview; returns the text of the card."""
        synth = self.synth
        if isinstance(synth, Compensated):
            composite_sheet(synth, preview)
            return data_card(self.manifest)
        decoded = synth.decode()
        if isinstance(decoded, Images):
            contact_sheet(decoded, preview)
            return data_card(self.manifest)
        _draw_graphs(decoded, preview)
        return graph_card({**self.manifest, "files": entries}, decoded)


def verify(folder: str | Path) -> list[str]:
    """Check everything in a saved set: a line for each thing found right, else raises as `load` does."""
    loaded = DistilledSet.load(folder)
    manifest, items = loaded.manifest, items_text(loaded.tensors, loaded.kind)
    return [
        f"{MANIFEST}: {schema.FORMAT} version {manifest['version']}, fields well formed, seal intact",
        *(f"{name}: {e['bytes']} bytes, SHA-256 as declared" for name, e in manifest["files"].items()),
        *(f"{name}: {t['dtype']} {t['shape']}, finite" for name, t in manifest["tensors"].items()),
        f"{manifest['count']} {items}, labels ({manifest['y_kind']}) in range",
    ]


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as JSON would give it back."""
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "Give finite numbers, texts, lists and tables"
        raise UsageError(f"{name} is not JSON: {error}", remedy) from error


def _read_data(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    schema.require_regular(path)
    try:
        read = files.read_tensors(path, manifest["files"][DATA])
    except (RuntimeError, OverflowError) as error:
        raise damaged(path, type(error).__name__) from error
    if {name: schema.declare(t) for name, t in read.items()} != manifest["tensors"]:
        raise damaged(path, "its tensors are not those that the manifest declares")
    # Tensors read from a buffer may lie unaligned, on which the last bit of a matrix product can depend.
    return {name: t.clone() for name, t in read.items()}


def _stored_problem(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str | None:
    wrong = _tensors_problem(tensors, manifest)
    counted = wrong is not None or stored_count(tensors, manifest) == manifest["count"]
    return wrong or (None if counted else "count is not the number of training items")


def _tensors_problem(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    dataset = fields["dataset"]
    if wrong := spec_problem(tensors, dataset):
        return wrong
    return tensors_problem(form_tensors(tensors, dataset), fields, spec_of(dataset, tensors))


def _draw_graphs(decoded: Trees | Graphs, path: Path) -> None:
    from synth.tree_sheet import tree_sheet

    tree_sheet(decoded, path)


def _require_file(path: Path, entry: Mapping[str, Any]) -> None:
    schema.require_regular(path)
    try:
        intact = path.stat().st_size == entry["bytes"] and files.sha256(path) == entry["sha256"]
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", schema.REMEDY) from error
    if not intact:
        raise damaged(path, "its size or SHA-256 is not the manifest's")
