"""Synthetic sets: their parametrisations, where they start, how they are stored, counted and shown."""

from synth.forest import Forest
from synth.forms import FORMS, Form
from synth.graph_subset import GraphSubset, stored_graphs
from synth.pixels import Pixels
from synth.sheet import contact_sheet
from synth.starts import SELECTIONS, STARTS, random_total, start_images
from synth.store import DistilledSet, verify
from synth.subset import Subset

__all__ = [
    "FORMS",
    "SELECTIONS",
    "STARTS",
    "DistilledSet",
    "Forest",
    "Form",
    "GraphSubset",
    "Pixels",
    "Subset",
    "contact_sheet",
    "random_total",
    "start_images",
    "stored_graphs",
    "verify",
]
