"""Networks that come with a set: one flat vector of parameters and one of batch-norm statistics each."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.errors import ArtefactError, UsageError, one_line
from ddengine.nets import NetSpec, build, find_network, resolve
from ddengine.rng import Rng
from ddengine.types import DataSpec

REMEDY = "Make the set again"
LARGEST = {"width": 2**16, "depth": 2**9}  # of a network that a manifest may name


def flat_teacher(net: nn.Module) -> tuple[Float[Tensor, " p"], Float[Tensor, " s"]]:
    """Parameters and statistics of `net` as `Compensated.teachers` holds them, float32.

    Statistics are the floating-point buffers: running means and variances, without their counters.
    """
    return _flat(list(net.parameters())), _flat(_statistics(net))


def build_teachers(networks: Any, stored: Sequence[tuple[Tensor, Tensor]], spec: DataSpec) -> list[nn.Module]:
    """The stored teachers as networks in eval mode; `networks` is the manifest's list of their NetSpecs.

    Raises ArtefactError where the two disagree in number or size, or a network cannot be built.
    """
    if not isinstance(networks, list) or len(networks) != len(stored):
        count = len(networks) if isinstance(networks, list) else "no"
        raise ArtefactError(f"{len(stored)} teachers are stored and the manifest names {count}", REMEDY)
    return [_build(named, *vectors, spec) for named, vectors in zip(networks, stored, strict=True)]


def _build(named: Any, params: Tensor, statistics: Tensor, spec: DataSpec) -> nn.Module:
    try:
        network = NetSpec(**named)
        _require_sizes(network, params, statistics, spec)
        net = build(network, spec.shape, len(spec.classes), Rng(0).torch("teacher"))
    except ArtefactError:
        raise
    except (UsageError, TypeError, ValueError, RuntimeError) as error:
        cause = one_line(error.cause if isinstance(error, UsageError) else error)
        raise ArtefactError(f"the teacher {named!r} cannot be built: {cause}", REMEDY) from error
    with torch.no_grad():
        for vector, tensors in ((params, list(net.parameters())), (statistics, _statistics(net))):
            for part, own in zip(vector.split([t.numel() for t in tensors]), tensors, strict=False):
                own.copy_(part.view(own.shape))
    return net.eval()


def _require_sizes(network: NetSpec, params: Tensor, statistics: Tensor, spec: DataSpec) -> None:
    """Refuse a network that the vectors do not fill, before memory is given to its weights."""
    for key, most in LARGEST.items():
        if (getattr(network, key) or 0) > most:
            raise UsageError(f"network.{key}={getattr(network, key)}", f"Give at most {most}")
    full = resolve(network, spec.shape).to_dict()
    options = {key: value for key, value in full.items() if key != "name" and value is not None}
    with torch.device("meta"):
        net = find_network(network.name)(spec.shape, len(spec.classes), **options)
    needed = [sum(t.numel() for t in tensors) for tensors in (net.parameters(), _statistics(net))]
    if needed != [len(params), len(statistics)]:
        raise ArtefactError(
            f"the teacher {network.name} has {needed[0]} parameters and {needed[1]} statistics, the set "
            f"stores {len(params)} and {len(statistics)}",
            REMEDY,
        )


def _statistics(net: nn.Module) -> list[Tensor]:
    return [buffer for buffer in net.buffers() if buffer.is_floating_point()]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().cpu().reshape(-1) for t in tensors] or [torch.zeros(0)])
