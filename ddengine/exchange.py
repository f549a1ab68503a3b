"""In and out: distilled sets that other tools made, and ours as other tools take them."""

from collections.abc import Sequence
from pathlib import Path

from ddengine.artefacts import artefact
from ddengine.config import ExportConfig, ImportSetConfig
from ddengine.given import Watch, given, load_named, network_spec
from synth import DistilledSet
from synth.exported import export
from synth.foreign import as_distilled, read_foreign


def run_import_set(paths: Sequence[Path], form: str, config: ImportSetConfig, watch: Watch) -> Path:
    """`ddengine import FILE ... --from FORMAT`: files of another tool as a set of ours; its folder.

    What was inferred and what is lost is said. Raises ArtefactError for damaged or hostile files.
    """
    dataset = load_named(config.dataset, watch)
    source = config.source
    foreign = read_foreign(
        [path.expanduser() for path in paths],
        form,
        dataset.fit.spec,
        space=source.space,
        lr=source.lr,
        experiment=source.experiment,
    )
    for note in foreign.notes:
        watch.notice(f"note: {note}")
    network = network_spec(config.network).to_dict()
    own = {"network": {key: value for key, value in network.items() if value is not None}}
    made = as_distilled(
        foreign, **own, origin={"name": config.dataset.name, **given(config.dataset)}, format=form
    )
    return made.save(Path(config.out).expanduser())


def run_export(path: Path, to: str, config: ExportConfig, watch: Watch) -> Path:
    """`ddengine export PATH --to FORMAT out=PATH`: where it lies now; what is lost is said."""
    out = Path(config.out).expanduser()
    for note in export(DistilledSet.load(artefact(path)), to, out):
        watch.notice(f"note: {note}")
    return out
