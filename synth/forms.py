"""The stored forms of synthetic sets, by the kind that a manifest names."""

from synth.pixels import Pixels
from synth.subset import Subset

Form = Pixels | Subset

FORMS: dict[str, type[Form]] = {"pixels": Pixels, "subset": Subset}
