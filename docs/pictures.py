"""The pictures of the documentation, from files that commands wrote:

ddengine demo && python docs/pictures.py runs/demo
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from PIL import Image

from ddengine import data, files
from ddengine.rng import Rng
from synth import DistilledSet, start_images

ASSETS = Path(__file__).parent / "assets"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
THEMES = {"": ("#1b1f3b", "#3949ab", "#b9bfdd"), "_dark": ("#e6e8f5", "#8c9eff", "#4a5180")}
SAID = {
    "random": "random real",
    "kmeans": "k-means",
    "full": "full data",
    "trajectory": "trajectory matching",
}


def main() -> None:
    """Draw everything; the one argument is the folder of a demo."""
    run = Path(sys.argv[1])
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "ddengine", "svg.fonttype": "none"})
    strip(run, ASSETS / "digits_ipc1.png")
    rows = json.loads((run / "table.json").read_text())["rows"]
    chosen = {name: row(rows, name) for name in ("distilled", "random", "herding", "kmeans", "full")}
    bars(chosen, "digits_bars")
    curve(run, "digits_loss")
    fashion = {name: row(table(f"fashion_mnist_{file}_ipc1"), "distilled") for name, file in (
        ("trajectory", "trajectory"), ("attention matching", "attention_w16"))}  # fmt: skip
    beside = table("fashion_mnist_trajectory_ipc1")
    bars(fashion | {name: row(beside, name) for name in ("kmeans", "random")}, "fashion_bars")


def table(name: str) -> list[dict[str, Any]]:
    """The rows of a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def row(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The row of that name on the first network."""
    return next(found for found in rows if found["name"] == name)


def strip(run: Path, path: Path) -> None:
    """Random real digits above, the distilled ones below, one of each class, eight pixels to a pixel."""
    made = DistilledSet.load(run / "distilled").decode()
    fit = data.load("digits").fit
    real = start_images("real", fit, 1, Rng(0).fold("picture"))
    lines = []
    for x in (real, made.x):
        grey = made.spec.denormalise(x).clamp(0, 1)[:, 0]
        lines.append(torch.nn.functional.pad(grey, (1, 1, 1, 1), value=1).permute(1, 0, 2).flatten(1))
    pixels = (torch.cat(lines) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).resize((pixels.shape[1] * 8, pixels.shape[0] * 8), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def bars(rows: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Accuracies with their intervals, once for light and once for dark pages."""
    for suffix, (ink, strong, weak) in THEMES.items():
        figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 0.6))
        for place, found in enumerate(rows.values()):
            mean, (low, high) = 100 * found["mean"], [100 * end for end in found["ci95"]]
            own = found["name"] == "distilled"
            axes.barh(place, mean, color=strong if own else weak, height=0.65)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=ink, capsize=3, lw=1.2)
            axes.text(high + 1.2, place, f"{mean:.1f}", color=ink, va="center")
        axes.set_yticks(range(len(rows)), [SAID.get(label, label) for label in rows])
        axes.set(xlim=(0, 108), xlabel="test accuracy, %")
        axes.invert_yaxis()
        save(figure, axes, ink, f"{name}{suffix}")


def curve(run: Path, name: str) -> None:
    """The loss of each logged step."""
    points = [(line["step"], line["loss"]) for line in files.read_json_lines(run / "metrics.jsonl")]
    for suffix, (ink, strong, _) in THEMES.items():
        figure, axes = plt.subplots(figsize=(7, 2.4))
        axes.plot(*zip(*points, strict=True), color=strong, lw=1.8)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        save(figure, axes, ink, f"{name}{suffix}")


def save(figure: Any, axes: Any, ink: str, name: str) -> None:
    """Without a frame or background, so that the page shows through."""
    axes.tick_params(which="both", colors=ink)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    figure.savefig(ASSETS / f"{name}.svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
