"""What a command will take, as one value for people and programs: time, memory, disk, and whether it fits."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddengine.ops.memory import available_memory, resident_memory
from expert_buffers.estimate import Estimate, in_bytes, in_words

REMEDIES = {
    "distill": "Give a smaller matcher.chunk, matcher.real_per_class, network.width or ipc, or "
    "dataset.memory=disk",
    "buffer": "Give a smaller recipe.batch_size, network.width or workers",
    "evaluate": "Give fewer workers, a smaller recipe.batch_size or network.width, or dataset.memory=disk",
}
ROOM = "Free some room, choose another out=DIR, or ask for less"


@dataclass(frozen=True)
class Forecast:
    """What `command` will take after its start-up: seconds, peak bytes of all its processes or of the GPU,
    and bytes on disk; what there is of these; `parts` of the seconds, and `counts` that they come from.
    """

    command: str
    subject: str
    seconds: float
    memory_bytes: int
    disk_bytes: int
    memory_room: int
    disk_room: int
    parts: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def lacking(self) -> tuple[str, str] | None:
        """What does not fit and what to change; None where all fits."""
        for name, need, room, remedy in (
            ("memory", self.memory_bytes, self.memory_room, REMEDIES[self.command]),
            ("disk", self.disk_bytes, self.disk_room, ROOM),
        ):
            if need > room:
                said = f"{self.command} would need {in_bytes(need)} of {name}, there are {in_bytes(room)}"
                return said, remedy
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self) | {"parts": dict(self.parts), "counts": dict(self.counts)}
        return found | {"fits": self.lacking is None, "lacking": list(self.lacking or ())}

    def text(self) -> str:
        """A few lines for people."""
        words = in_words(Estimate(self.seconds, self.memory_bytes, self.disk_bytes, 0))
        parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.parts.items())
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        lines = [f"{self.subject}: about {words}", f"  time: {parts}", f"  counts: {counts}"]
        lines.append(
            f"  there are {in_bytes(self.memory_room)} of memory, {in_bytes(self.disk_room)} of disk"
        )
        if self.lacking is not None:
            lines += [f"does not fit: {self.lacking[0]}", f"  fix: {self.lacking[1]}"]
        return "\n".join(lines)


def memory_room(device: torch.device) -> int:
    """Bytes that a process on `device` can have in all: what is free, and what this one has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_memory() + resident_memory()


def disk_room(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or would be made."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
