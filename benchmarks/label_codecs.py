"""Stored soft labels: bytes, divergence from float32, and the accuracy of networks trained on them.

    python benchmarks/label_codecs.py SET --experts DIR --root FILE [--temperature 30]

SET is a compensated set, DIR the buffer of its teachers, FILE the npz that it was made from. The labels are
the teachers' mean logits of its composites, computed anew in float32; each codec stores and decodes them. KL
is taken at T = 1 and, times T^2, at T = 20. Networks are trained on the same composites, batches and weights.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine import data, judge
from ddengine.nets import NetSpec
from ddengine.ops.kd import soft_labels
from ddengine.tables import spread
from ddengine.train import Recipe
from expert_buffers import ExpertBuffer
from matchers.compensator_options import KD
from synth import DistilledSet
from synth.labels import decode_labels, decode_topk, encode_labels, encode_topk

RESULTS = Path(__file__).parent / "results"
TRAINED = ("fp32", "fp16", "int8", "int4", "top5")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set")
    parser.add_argument("--experts", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--temperature", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", metavar="NAME")
    o = parser.parse_args()
    dataset, buffer = data.load("npz", root=o.root), ExpertBuffer(o.experts)
    synth = DistilledSet.load(o.set).synth
    nets = [buffer.build(i, buffer.epochs(i)).eval() for i in range(len(buffer))]
    z = soft_labels(nets, synth.composites(), "cpu")
    rows = []
    for name, (nbytes, decoded) in codecs(z).items():
        row: dict[str, Any] = {
            "codec": name,
            "bytes": nbytes,
            "kl_1": kl(z, decoded, 1),
            "kl_20": kl(z, decoded, 20),
        }
        if name in TRAINED:
            row["values"] = accuracies(replace(synth, labels=decoded, label_codec="fp32"), dataset, o)
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(table(z, rows, o))
    if o.save:
        found = {"rows": rows, "labels": list(z.shape), "torch": torch.__version__, "arguments": vars(o)}
        (RESULTS / f"{o.save}.json").write_text(json.dumps(found, indent=1) + "\n")


def codecs(z: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Stored bytes and what comes back, by codec; top-k in its own form."""
    found = {}
    for name in ("fp32", "fp16", "int8", "int4"):
        stored = encode_labels(z, name)
        found[name] = (sum(t.nbytes for t in stored.values()), decode_labels(stored, z.shape[1]))
    for top in (1, 3, 5):
        stored = encode_topk(z, top)
        found[f"top{top}"] = (sum(t.nbytes for t in stored.values()), decode_topk(stored, z.shape[1]))
    return found


def kl(z: Tensor, decoded: Tensor, temperature: float) -> float:
    """Mean T^2 KL(softmax(z / T) || softmax(decoded / T)), in float64."""
    p, q = ((v.double() / temperature).log_softmax(1) for v in (z, decoded))
    return temperature**2 * float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def accuracies(synth: Any, dataset: data.Dataset, o: argparse.Namespace) -> list[float]:
    """Test accuracies of fresh networks."""
    values = {**KD, "steps": o.steps, "temperature": o.temperature, "augment": "crop_flip", "lrs": (2e-3,)}
    found = judge.evaluate(
        DistilledSet.make(synth, recipe={"labels": "static"}, provenance={}),
        dataset,
        networks=[NetSpec("convnet", width=o.width, norm="batch")],
        seeds=o.seeds,
        rows=(),
        recipe=Recipe(**values),
        workers=o.workers,
    )
    return list(found.rows[0].values)


def table(z: Tensor, rows: list[dict[str, Any]], o: argparse.Namespace) -> str:
    lines = [
        f"{len(z):,} labels of {z.shape[1]} classes; {o.seeds} networks, {o.steps} steps, T {o.temperature}",
        "",
        "| codec | bytes | KL, T = 1 | 400 KL, T = 20 | accuracy | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        score = " | "
        if "values" in row:
            mean, std, interval = spread(row["values"])
            low, high = interval or (mean, mean)
            score = f"{100 * mean:.1f} ± {100 * (std or 0):.1f} | {100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"| {row['codec']} | {row['bytes']:,} | {row['kl_1']:.1e} | {row['kl_20']:.1e} | {score} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
