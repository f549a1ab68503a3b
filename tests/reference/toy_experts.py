"""Small expert buffers: random walks of tiny networks, written as the recorder writes them."""

import torch

from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.types import DataSpec
from expert_buffers.params import ParamSpec
from expert_buffers.store import (
    ExpertBuffer,
    Recording,
    commit,
    header,
    open_for_writing,
    save_expert,
)

SPEC = DataSpec("toy", (1, 8, 8), tuple("abcde"), (0.5,), (0.25,), fingerprint="ab12" * 16)
NET = NetSpec("convnet", width=3, depth=2)
BATCH = NetSpec("convnet", width=3, depth=2, norm="batch")
RECIPE = {"name": "mtt", "lr": 0.01, "momentum": 0.0, "augment": ["color", "flip"]}


def head(networks=(NET,), spec=SPEC, recipe=RECIPE, seed=7, encoding="delta16", root="here"):
    return header(spec, list(networks), recipe, seed, encoding, {"name": spec.name, "root": root})


def walk(network=NET, epochs=4, seed=0, step=0.01, spec=SPEC):
    """Parameters [t p], statistics [t s], losses and accuracies [t] of a random walk from a fresh network."""
    net = build(network, spec.shape, len(spec.classes), Rng(seed).torch("weights"))
    start = ParamSpec.of(net).flatten(dict(net.named_parameters())).detach()
    stats = ParamSpec.of_buffers(net).flatten(dict(net.named_buffers()))
    generator = torch.Generator().manual_seed(seed)
    moves = step * torch.randn(epochs, len(start), generator=generator).cumsum(0)
    params = torch.cat([start[None], start + moves])
    counts = torch.arange(epochs + 1.0)[:, None]
    return params, stats + counts, 2 / (1 + counts[:, 0]), counts[:, 0] / (epochs + 1)


def recording(walked, encoding="delta16", rows=None, momentum=True):
    """A recording of the first `rows` rows of a walk, the momentum of row t being -params_t."""
    params, stats, loss, accuracy = walked
    made = Recording.begin(encoding, params[0], stats[0], float(loss[0]), float(accuracy[0]))
    return extended(made, walked, rows, momentum)


def extended(made, walked, rows=None, momentum=True):
    """The recording with the rows of the walk that it lacks, up to `rows`."""
    params, stats, loss, accuracy = walked
    for t in range(made.epochs + 1, rows or len(params)):
        resume = {"params": params[t]} | ({"momentum": -params[t]} if momentum else {})
        made = made.append(params[t], stats[t], float(loss[t]), float(accuracy[t]), resume)
    return made


def write(root, walks, networks=(NET,), **options):
    """A buffer of these walks; expert i has network i modulo the number of networks."""
    top = head(networks, **options)
    manifest = open_for_writing(root, top)
    names = list(top["architectures"])
    for number, walked in enumerate(walks):
        made = recording(walked, top["encoding"])
        entry = save_expert(root, number, names[number % len(names)], made)
        plan = {"count": len(walks), "epochs": made.epochs}
        manifest = commit(root, manifest, number, entry, plan)
    return ExpertBuffer(root)
