"""One expert: its trajectory as it is used, and the encoded rows that a file of it holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import ArtefactError, DDError, require
from ddengine.nets import NetSpec
from expert_buffers.params import ParamSpec

ENCODINGS = ("delta16", "fp32")
TOP = 10  # a row's largest delta is scaled to 2^9..2^10: far from float16's end (2^16) and its subnormals
LOWEST = -126  # exponent of the smallest normal float32, below which a scale would lose bits
Declared = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Read = Callable[[str, slice], Tensor]  # a run of rows of a stored tensor, by name


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One expert, all checkpoints decoded to float32: row 0 is the start, row t is after epoch t.

    `params` and `stats` are laid out by `spec` and `stat_spec`; `network` is resolved. `loss` and `accuracy`
    (0..1), on a fixed draw of fit images without augmentation, are empty for an imported expert.
    """

    params: Float[Tensor, "t p"]
    stats: Float[Tensor, "t s"]
    epoch: Int[Tensor, " t"]
    loss: Float[Tensor, " l"]
    accuracy: Float[Tensor, " l"]
    spec: ParamSpec
    stat_spec: ParamSpec
    network: NetSpec


@dataclass(frozen=True, eq=False)
class Recording:
    """One expert as its file holds it, growing by rows; every row is encoded by itself.

    fp32: `encoded` has "params" [t p]. delta16: "start" [p], "delta" [t-1 p] in float16 and "scale" [t-1],
    where row t is start + scale_t * delta_t. `resume` is the exact float32 state after the last epoch:
    "params" [p], and "momentum" [p] where there is one. `loss` and `accuracy` are empty when unknown.
    """

    encoding: str
    encoded: dict[str, Tensor]
    stats: Float[Tensor, "t s"]
    loss: Float[Tensor, " l"]
    accuracy: Float[Tensor, " l"]
    resume: dict[str, Tensor]

    @staticmethod
    def begin(
        encoding: str,
        params: Float[Tensor, " p"],
        stats: Float[Tensor, " s"],
        loss: float | None,
        accuracy: float | None,
    ) -> "Recording":
        """Row 0, the untrained network; loss and accuracy None if unknown. DDError when it is not finite."""
        require(encoding, ENCODINGS, "encoding")
        _require_finite(0, params, stats, *_number(loss), *_number(accuracy))
        start = _own(params)
        encoded = {"params": start[None].clone()} if encoding == "fp32" else {
            "start": start, "delta": torch.empty(0, len(start), dtype=torch.float16), "scale": torch.empty(0),
        }  # fmt: skip
        rows = (_own(stats)[None], _number(loss), _number(accuracy))
        return Recording(encoding, encoded, *rows, {"params": start.clone()})

    def append(
        self,
        params: Float[Tensor, " p"],
        stats: Float[Tensor, " s"],
        loss: float | None,
        accuracy: float | None,
        resume: Mapping[str, Tensor],
    ) -> "Recording":
        """The recording with one more row, all of it copied. DDError when the row is not finite."""
        _require_finite(self.epochs + 1, params, stats, *_number(loss), *_number(accuracy), *resume.values())
        if self.encoding == "fp32":
            added = {"params": _own(params)}
        else:
            delta, scale = encode(_own(params), self.encoded["start"], self.epochs + 1)
            added = {"start": torch.empty(0), "delta": delta, "scale": scale}
        return Recording(
            self.encoding,
            {k: old if k == "start" else torch.cat([old, added[k][None]]) for k, old in self.encoded.items()},
            torch.cat([self.stats, _own(stats)[None]]),
            torch.cat([self.loss, _number(loss)]),
            torch.cat([self.accuracy, _number(accuracy)]),
            {name: _own(tensor) for name, tensor in resume.items()},
        )

    @property
    def epochs(self) -> int:
        """Epochs recorded: rows - 1."""
        return len(self.stats) - 1

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, by name; resume state as "resume.params" and "resume.momentum"."""
        measured = {"loss": self.loss, "accuracy": self.accuracy} if len(self.loss) else {}
        state = {f"resume.{name}": tensor for name, tensor in self.resume.items()}
        return {**self.encoded, "stats": self.stats, **measured, **state}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Recording":
        """The recording that a file holds; ArtefactError for a missing, ill-formed or non-finite tensor."""
        encoding = "fp32" if "params" in tensors else "delta16"
        first, stats = tensors.get("params" if encoding == "fp32" else "start"), tensors.get("stats")
        if first is None or stats is None or not first.ndim or stats.ndim != 2:
            raise ArtefactError("it holds no trajectory", "Restore it from a copy or record it again")
        extent = (len(stats), first.shape[-1], stats.shape[1])
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if wrong := problem(found, encoding, *extent, "loss" in found):
            raise ArtefactError(wrong, "Restore it from a copy or record it again")
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ArtefactError(f"{name} is not finite", "Restore it from a copy or record it again")
        rows = {name: tensors[name] for name in layout(encoding, *extent, False, False)}
        resume = {k.removeprefix("resume."): v for k, v in tensors.items() if k.startswith("resume.")}
        encoded = {k: v for k, v in rows.items() if k != "stats" and not k.startswith("resume.")}
        none = torch.empty(0)
        measured = (tensors.get("loss", none), tensors.get("accuracy", none))
        return Recording(encoding, encoded, stats, *measured, resume)

    def fault(self) -> str | None:
        """What is wrong with finite, well-formed rows: two that follow one another are equal, or the resume
        state is not the last row. In words; None when nothing is.
        """
        before = self.rows([0])
        for row in range(1, self.epochs + 1):
            after = self.rows([row])
            if torch.equal(before, after):
                return f"checkpoints {row - 1} and {row} are equal"
            before = after
        state = self.resume["params"]
        if self.encoding == "delta16" and self.epochs:
            delta, scale = encode(state, self.encoded["start"], self.epochs)
            same = torch.equal(delta, self.encoded["delta"][-1]) and torch.equal(
                scale, self.encoded["scale"][-1]
            )
        else:
            same = torch.equal(state, before[0])
        return None if same else "the resume state is not that of its last checkpoint"

    def rows(self, index: Sequence[int]) -> Float[Tensor, "r p"]:
        """The parameters of the rows at `index` (0..epochs), decoded."""
        return decode(self.encoding, index, lambda name, run: self.encoded[name][run])


def encode(
    params: Float[Tensor, " p"], start: Float[Tensor, " p"], row: int
) -> tuple[Float[Tensor, " p"], Float[Tensor, ""]]:
    """A row as (float16 delta from `start`, scale); the scale is a power of two, so scaling loses no bit."""
    delta = params - start
    _require_finite(row, delta)
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    scale = math.ldexp(1.0, max(math.frexp(largest)[1] - TOP, LOWEST)) if largest else 1.0
    return (delta / scale).half(), torch.tensor(scale)


def decode(encoding: str, index: Sequence[int], read: Read) -> Float[Tensor, "r p"]:
    """Rows `index` in float32, in their own memory, from the stored tensors that `read` gives."""
    if encoding == "fp32":
        return gather("params", index, read).clone()
    start = read("start", slice(None))
    deltas = [i - 1 for i in index if i > 0]
    rows = start.expand(len(index), -1).clone()
    if deltas:
        moved = gather("scale", deltas, read)[:, None] * gather("delta", deltas, read).float()
        rows[[place for place, i in enumerate(index) if i > 0]] += moved
    return rows


def gather(name: str, index: Sequence[int], read: Read) -> Tensor:
    """Rows `index` of a stored tensor: one read where they are consecutive, else one for each."""
    run = slice(index[0], index[0] + len(index)) if index else slice(0, 0)
    if list(index) == list(range(run.start, run.stop)):
        return read(name, run)
    return torch.cat([read(name, slice(i, i + 1)) for i in index])


def layout(encoding: str, t: int, p: int, s: int, measured: bool, momentum: bool) -> Declared:
    """Names, types and shapes of the tensors of an expert with t rows, p parameters and s statistics."""
    full, vector = torch.float32, (p,)
    rows: Declared = {"params": (full, (t, p))} if encoding == "fp32" else {
        "start": (full, vector), "delta": (torch.float16, (t - 1, p)), "scale": (full, (t - 1,)),
    }  # fmt: skip
    known: Declared = {"loss": (full, (t,)), "accuracy": (full, (t,))} if measured else {}
    state = {"resume.params": (full, vector)} | ({"resume.momentum": (full, vector)} if momentum else {})
    return {**rows, "stats": (full, (t, s)), **known, **state}


def problem(found: Declared, encoding: str, t: int, p: int, s: int, measured: bool) -> str | None:
    """Where tensors found in a file differ from the layout of an expert, in words; None when they do not."""
    right = layout(encoding, t, p, s, measured, "resume.momentum" in found)
    for name in sorted(found.keys() | right.keys()):
        if name not in found or name not in right:
            return f"tensor {name!r} is {'missing' if name in right else 'unknown'}"
        if found[name] != right[name]:
            return f"{name} is {_says(found[name])} where {_says(right[name])} belongs"
    return None


def _says(declared: tuple[torch.dtype, tuple[int, ...]]) -> str:
    return f"{str(declared[0]).removeprefix('torch.')} {list(declared[1])}"


def _number(value: float | None) -> Float[Tensor, " l"]:
    return torch.empty(0) if value is None else torch.tensor([float(value)])


def _own(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU: `.cpu()` alone would leave a row aliasing weights that train on."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _require_finite(row: int, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DDError(
            f"expert diverged: its state after epoch {row} is not finite",
            "Lower recipe.lr, and give another out=DIR",
        )
