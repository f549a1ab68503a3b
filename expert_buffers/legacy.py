"""Import of released trajectories: the `replay_buffer_*.pt` files that MTT, FTD and DATM publish.

A file is a list of experts, each a list of checkpoints, each a list of parameter tensors without names, in
the order in which the released networks register their layers: that of their use.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddengine import files
from ddengine.archives import TENSORS, is_dense, load_archive, reason_of
from ddengine.errors import ArtefactError, UsageError, require
from ddengine.nets import NetSpec, build, has_batch_norm, resolve
from ddengine.rng import Rng
from ddengine.types import DataSpec
from expert_buffers.manifest import header, require_regular
from expert_buffers.params import ParamSpec
from expert_buffers.store import ENCODINGS, ExpertBuffer
from expert_buffers.trajectory import Recording
from expert_buffers.writing import commit, open_for_writing, save_expert

LIMIT = 8 << 30  # bytes of a file; ten experts of CIFAR-10 have 0.65 GB
REMEDY = "Give a replay_buffer_*.pt of this network, fetched again from where it was published"
ALLOWED = {*TENSORS, "torch FloatStorage"}
SAW = "the whole train split, as far as is known: validation images may be among it"
Expert = list[list[Tensor]]


def read_replay_buffer(path: Path, spec: ParamSpec, limit: int = LIMIT) -> list[Float[Tensor, "t p"]]:
    """The experts in a released file, each [t p] in float32, laid out by `spec`.

    The file must be an uncompressed zip of at most `limit` bytes that refers to nothing but float32 tensors
    (see `load_archive`). Raises ArtefactError naming the file for anything else, other shapes, numbers that
    are not finite, fewer than two checkpoints, and checkpoints equal to the one before, as the released
    scripts write them on a CPU.
    """
    require_regular(path)
    try:
        experts = load_archive(path, ALLOWED, limit=limit)
        return _flat_experts(experts, spec, path.stat().st_size)
    except Exception as error:  # damaged zips and pickles raise errors of any kind
        raise ArtefactError(
            f"{path} is no replay buffer of this network: {reason_of(error)}", REMEDY
        ) from error


def _flat_experts(experts: Any, spec: ParamSpec, size: int) -> list[Float[Tensor, "t p"]]:
    """The flattened experts of a file of `size` bytes; ValueError says which of the rules is broken."""
    if type(experts) is not list or not experts:
        raise ValueError("it is not a list of experts")
    rows = 0
    for number, expert in enumerate(experts):
        _check_expert(expert, number, spec)
        rows += len(expert)
        if 4 * rows * sum(spec.sizes) > size:
            raise ValueError("its checkpoints share storage, they cannot all be different")
    return [_flatten(expert, number) for number, expert in enumerate(experts)]


def _check_expert(expert: Any, number: int, spec: ParamSpec) -> None:
    if type(expert) is not list or len(expert) < 2:
        raise ValueError(f"expert {number} is not a list of two or more checkpoints")
    for epoch, row in enumerate(expert):
        where = f"checkpoint {epoch} of expert {number}"
        if type(row) is not list or not all(isinstance(tensor, Tensor) for tensor in row):
            raise ValueError(f"{where} is not a list of tensors")
        shapes = tuple(tuple(tensor.shape) for tensor in row)
        if shapes != spec.shapes:
            raise ValueError(f"{where} has {_difference(shapes, spec)}")
        for tensor in row:
            if tensor.dtype != torch.float32 or not is_dense(tensor):
                raise ValueError(f"{where} has a tensor that is not float32 in storage of its own size")
        if epoch and all(map(torch.equal, row, expert[epoch - 1])):
            raise ValueError(
                f"{where} equals the one before: recorded on a CPU, the released scripts keep only the last"
            )


def _difference(shapes: Sequence[tuple[int, ...]], spec: ParamSpec) -> str:
    if len(shapes) != len(spec.shapes):
        return f"{len(shapes)} tensors where the network has {len(spec.shapes)}"
    found = next(i for i, shape in enumerate(shapes) if shape != spec.shapes[i])
    return f"shape {list(shapes[found])} where {spec.names[found]} has {list(spec.shapes[found])}"


def _flatten(expert: Expert, number: int) -> Float[Tensor, "t p"]:
    rows = torch.stack([torch.cat([tensor.reshape(-1) for tensor in row]) for row in expert])
    if not bool(rows.isfinite().all()):
        raise ValueError(f"expert {number} is not finite")
    return rows


def order_of_use(net: nn.Module, shape: tuple[int, int, int]) -> ParamSpec:
    """The parameters of `net` in the order in which a forward pass meets their layers, as released files
    list them: a convolution is followed by its own norm.
    """
    names: list[str] = []

    def note(prefix: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any) -> None:
            names.extend(f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(f"{name}." if name else ""))
        for name, module in net.named_modules()
    ]
    with torch.no_grad():
        net(torch.zeros(2, *shape))
    for hook in hooks:
        hook.remove()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    order = [*dict.fromkeys(names), *(name for name in shapes if name not in names)]
    return ParamSpec(tuple(order), tuple(shapes[name] for name in order))


def convert(
    paths: Sequence[Path],
    out: Path,
    *,
    spec: DataSpec,
    network: NetSpec,
    recipe: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    encoding: str = "delta16",
) -> ExpertBuffer:
    """Write the experts of released files, in their order, as an expert buffer in `out`, and open it.

    `spec` and `network` are what they were trained on; the files say neither. Released experts saw the whole
    train split, of which `spec` is the fit part, and their own whitening: the manifest says so as `saw`.
    Losses, accuracies and optimiser states are not in them, so the buffer cannot be continued. The same call
    goes on where it was cut off. Raises as `read_replay_buffer` and `open_for_writing` do, and UsageError for
    networks with batch norm, whose statistics were not released.
    """
    require(encoding, ENCODINGS, "encoding")
    full = resolve(network, spec.shape)
    if has_batch_norm(full):
        raise UsageError(
            "released buffers hold no batch-norm statistics", "Give a network without batch norm"
        )
    net = build(full, spec.shape, len(spec.classes), Rng(0).torch("layout"))
    for path in paths:
        require_regular(path)
    sums = [files.sha256(path) for path in paths]
    imported = {"name": "imported", "files": [path.name for path in paths], "sha256": sums, "saw": SAW}
    head = header(spec, [full], imported | dict(recipe or {}), 0, encoding, origin or {})
    (architecture,) = head["architectures"]
    manifest = open_for_writing(out, head)
    number, layout, used = 0, ParamSpec.of(net), order_of_use(net, spec.shape)
    for path in paths:
        for found in read_replay_buffer(path, used):
            if str(number) not in manifest["experts"]:
                rows = torch.stack([layout.flatten(used.unflatten(row)) for row in found])
                entry = save_expert(out, number, architecture, _record(rows, encoding))
                plan = {"count": number + 1, "epochs": len(rows) - 1}
                manifest = commit(out, manifest, number, entry, plan)
            number += 1
    return ExpertBuffer(out)


def _record(rows: Float[Tensor, "t p"], encoding: str) -> Recording:
    none = torch.empty(0)
    recording = Recording.begin(encoding, rows[0], none, None, None)
    for row in rows[1:]:
        recording = recording.append(row, none, None, None, {"params": row})
    return recording
