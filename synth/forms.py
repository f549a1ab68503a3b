"""The stored forms of synthetic sets, by the kind that a manifest names."""

from typing import Any

from synth.forest import Forest
from synth.graph_subset import GraphSubset
from synth.pixels import Pixels
from synth.subset import Subset

Form = Pixels | Subset | Forest | GraphSubset

FORMS: dict[str, type[Any]] = {"pixels": Pixels, "subset": Subset, "forest": Forest, "graphs": GraphSubset}
