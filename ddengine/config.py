"""Configuration as plain dataclasses: the keys, types and defaults of every command (composed by hydra)."""

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # hydra's mark of a value that must be given


@dataclass
class DatasetConfig:
    """Which data: `root` a folder or file, `size` pixels to resize to, `preprocessing` standard or zca."""

    name: str = MISSING
    root: str | None = None
    size: int | None = None
    preprocessing: str = "standard"
    on_error: str = "raise"
    download: bool = True
    memory: str = "auto"


@dataclass
class GraphDatasetConfig:
    """Which graphs: `name` in a `collection` (tu or ogb), whose folder lies in `root`.

    `discretise` quantile or kmeans turns continuous attributes into `bins` codes, none leaves them out;
    `split` is the number of the hashed split of a set that has no official one.
    """

    collection: str = MISSING
    name: str = MISSING
    root: str | None = None
    discretise: str | None = None
    bins: int = 8
    split: int = 0
    download: bool = True


@dataclass
class NetworkConfig:
    """Which network; null means the network's own default."""

    name: str = "convnet"
    width: int | None = None
    depth: int | None = None
    norm: str | None = None


@dataclass
class BudgetConfig:
    """The other way to say how much a set may hold."""

    nbytes: int | None = None


@dataclass
class CheckpointConfig:
    """When a run saves its state: every so many steps, and every so many minutes."""

    steps: int | None = None
    minutes: float = 5.0


@dataclass
class RecipeConfig:
    """How the judge trains: equal optimiser steps for every row, rates tried on the validation part.

    Null is what the set's manifest says, else the default; `augment` auto is the dataset's DSA string.
    """

    steps: int | None = None
    lrs: list[float] | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    augment: str | None = None
    optimiser: str | None = None
    loss: str | None = None
    temperature: float | None = None
    squared: bool | None = None
    mix: str | None = None
    mix_alpha: float | None = None
    augment_mode: str | None = None
    ema: float | None = None


@dataclass
class GraphRecipeConfig:
    """How the judge trains graph networks: full-batch Adam; several rates are tried on validation."""

    steps: int = 300
    lrs: list[float] = field(default_factory=lambda: [0.001, 0.005])
    weight_decay: float = 0.0
    pool: str = "mean"
    dropout: float = 0.0
    balance: bool = True


@dataclass
class SavingConfig:
    """How often a recording keeps the epochs of unfinished experts."""

    minutes: float = 5.0


def _groups(*names: str, row: bool = False) -> list[Any]:
    given = {"dataset": MISSING, "matcher": "attention", "network": "convnet", "recipe": "mtt"}
    return ["_self_", *({name: given[name]} for name in names), *([{"row": None}] if row else [])]


@dataclass
class DistillConfig:
    """`ddengine distill`; `workers` null means the cores, for matchers that have independent work.

    `replicas` draw networks or segments of their own; the processes of torchrun share them. `track` names
    trackers, one or a list (see `ddengine.tracking`).
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "matcher", "network", row=True))
    dataset: Any = MISSING
    matcher: Any = MISSING
    network: NetworkConfig = field(default_factory=NetworkConfig)
    ipc: int | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    experts: str | None = None
    seed: int = 0
    out: str | None = None
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    synth: str | None = None
    replicas: int = 1
    workers: int | None = None
    track: Any = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class BufferConfig:
    """`ddengine buffer`; `epochs` null means max_start_epoch + expert_epochs, or the recipe's own
    length where its rate falls to zero; `workers` null the cores.
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network", "recipe"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    networks: list[str] | None = None
    recipe: Any = MISSING
    count: int = 100
    epochs: int | None = None
    max_start_epoch: int = 19
    expert_epochs: int = 2
    full_experts: int = 0
    encoding: str = "delta16"
    seed: int = 0
    out: str | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    track: Any = None
    checkpoint: SavingConfig = field(default_factory=SavingConfig)


@dataclass
class ImportConfig:
    """`ddengine import FILE ...`: what the networks in the files are, and what they were trained on."""

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    encoding: str = "delta16"
    out: str = MISSING


@dataclass
class SourceConfig:
    """How to read another tool's files: `space` auto, pixels, normalised or zca; a rate; one of several."""

    space: str = "auto"
    lr: float | None = None
    experiment: int | None = None


@dataclass
class ImportSetConfig:
    """`ddengine import FILE ...` of a distilled set: what it was made from, and with which network."""

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    out: str = MISSING


@dataclass
class ExportConfig:
    """`ddengine export PATH --to FORMAT`: the folder or file to write."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_"])
    out: str = MISSING


@dataclass
class ContinualConfig:
    """`ddengine downstream continual PATH`: `steps` groups of classes, in `orders` orders, `seeds` networks
    a stage; `ipc` of the rows of real images, null the set's.
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    steps: int = 5
    orders: int = 3
    seeds: int = 1
    rows: list[str] | None = None
    ipc: int | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    out: str | None = None


@dataclass
class NasConfig:
    """`ddengine downstream nas PATH`: a space of ConvNets, `seeds` networks of each architecture.

    `reference` trains on all the data; its steps are ten times the recipe's where they are null.
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    widths: list[int] = field(default_factory=lambda: [8, 16, 32])
    depths: list[int] = field(default_factory=lambda: [1, 2, 3])
    norms: list[str] = field(default_factory=lambda: ["none", "instance", "batch", "layer"])
    seeds: int = 1
    rows: list[str] | None = None
    ipc: int | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    reference: RecipeConfig = field(default_factory=RecipeConfig)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    out: str | None = None


@dataclass
class AuditConfig:
    """`ddengine audit PATH`: `seeds` networks of each row are attacked."""

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seeds: int = 4
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    out: str | None = None


@dataclass
class EvaluateConfig:
    """`ddengine evaluate PATH`; dataset, network and recipe default to what the set's manifest names.

    `experts` is a buffer whose experts are the teachers, in place of those stored in the set; `rows` null
    means the usual ones: five of real images, those that the scores need, and random_same_labels where
    teachers gave the set its labels. `kept` is the folder of rows that depend on data and recipe alone: auto
    the user's cache, none for none.
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    networks: list[str] | None = None
    protocol: str = "standard-v1"
    seeds: int | None = None
    seed: int = 0
    rows: list[str] | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    robust: list[str] = field(default_factory=list)
    severity: int = 3
    kept: str = "auto"
    experts: str | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: int | None = None
    out: str | None = None
    track: Any = None


@dataclass
class EvaluateGraphsConfig:
    """`ddengine evaluate PATH` of a set of graphs; dataset and network default to what its manifest names,
    rows to all that its labels allow.
    """

    defaults: list[Any] = field(default_factory=lambda: _groups("dataset", "network"))
    dataset: Any = MISSING
    network: NetworkConfig = field(default_factory=NetworkConfig)
    networks: list[str] | None = None
    protocol: str = "standard-v1"
    seeds: int = 5
    seed: int = 0
    rows: list[str] | None = None
    recipe: GraphRecipeConfig = field(default_factory=GraphRecipeConfig)
    workers: int | None = None
    out: str | None = None
    track: Any = None


@dataclass
class DemoConfig:
    """`ddengine demo`."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_"])
    out: str = "runs/demo"
    seed: int = 0
    seeds: int = 5


@dataclass
class SlurmConfig:
    """What each job of a multirun asks of Slurm; null is the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    minutes: int = 240
    cpus: int = 4
    gpus: int = 0
    memory_gb: int | None = None


@dataclass
class MultirunConfig:
    """Where `-m` runs its jobs, and how many at a time: null is one here, and as Slurm will in Slurm."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_"])
    launcher: str = "local"
    jobs: int | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


COMMANDS: dict[str, type] = {
    "multirun": MultirunConfig,
    "distill": DistillConfig,
    "buffer": BufferConfig,
    "import": ImportConfig,
    "import_set": ImportSetConfig,
    "export": ExportConfig,
    "downstream_continual": ContinualConfig,
    "downstream_nas": NasConfig,
    "audit": AuditConfig,
    "evaluate": EvaluateConfig,
    "evaluate_graphs": EvaluateGraphsConfig,
    "demo": DemoConfig,
}
