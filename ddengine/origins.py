"""Where our packages come from: `synth` and `matchers` are common names, and another may stand in front."""

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

SIBLINGS = ("synth", "matchers", "expert_buffers")
ROOT = Path(__file__).resolve().parent.parent


class SiblingFinder:
    """Finds the packages that lie beside ddengine first, whatever stands earlier on sys.path."""

    @staticmethod
    def find_spec(
        name: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a sibling package, None for every other name."""
        return PathFinder.find_spec(name, [str(ROOT)]) if name in SIBLINGS else None


def pin() -> None:
    """Make imports of our packages find ours (the console script calls this before any of them)."""
    if SiblingFinder not in sys.meta_path:
        sys.meta_path.insert(0, SiblingFinder)  # type: ignore[arg-type]


def foreign() -> list[tuple[str, str]]:
    """(name, file) of each of our packages that would be, or has been, imported from somewhere else."""
    found = []
    for name in SIBLINGS:
        spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        origin = (spec.origin or "".join(folders[:1])) if spec else "nowhere"
        if Path(origin).resolve().parent.parent != ROOT:
            found.append((name, origin))
    return found


def check() -> None:
    """UsageError naming the first foreign module, if there is one."""
    from ddengine.errors import UsageError

    for name, origin in foreign():
        raise UsageError(
            f"'{name}' would be imported from {origin}, which is not ddengine's",
            f"Rename it, or work from a folder without '{name}' (the command `ddengine` is safe from it)",
        )
