"""Synthetic sets: their parametrisations, where they start, how they are stored, counted and shown."""

from synth.budget import SheetPlan, nominal_bytes, plan
from synth.compensated import Compensated
from synth.factored import Factored
from synth.forest import Forest
from synth.forms import FORMS, Form
from synth.graph_subset import GraphSubset, stored_graphs
from synth.labels import LABEL_CODECS, decode_labels, encode_labels, label_row_bytes
from synth.pixels import Pixels
from synth.sheet import contact_sheet
from synth.starts import SELECTIONS, STARTS, random_total, start_images
from synth.store import DistilledSet, verify
from synth.subset import Subset
from synth.teachers import flat_teacher

__all__ = [
    "FORMS",
    "LABEL_CODECS",
    "SELECTIONS",
    "STARTS",
    "Compensated",
    "DistilledSet",
    "Factored",
    "Forest",
    "Form",
    "GraphSubset",
    "Pixels",
    "SheetPlan",
    "Subset",
    "contact_sheet",
    "decode_labels",
    "encode_labels",
    "flat_teacher",
    "label_row_bytes",
    "nominal_bytes",
    "plan",
    "random_total",
    "start_images",
    "stored_graphs",
    "verify",
]
