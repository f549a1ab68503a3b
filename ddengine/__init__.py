"""ddengine: a large dataset in, a tiny synthetic one out, and a fair judge beside it.

>>> import ddengine as dd
>>> task = dd.task("digits", ipc=1)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddengine.evaluating import evaluate
    from ddengine.loop import Result, Schedule, distill
    from ddengine.recipes import matcher, task
    from ddengine.types import Budget, DataSpec, Images, Task

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "DataSpec",
    "Images",
    "Result",
    "Schedule",
    "Task",
    "distill",
    "evaluate",
    "matcher",
    "task",
]

_HOME = {
    **dict.fromkeys(("task", "matcher"), "ddengine.recipes"),
    "evaluate": "ddengine.evaluating",
    **dict.fromkeys(("distill", "Result", "Schedule"), "ddengine.loop"),
    **dict.fromkeys(("Budget", "DataSpec", "Images", "Task"), "ddengine.types"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import ddengine` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'ddengine' has no attribute '{name}'")
    import_module("ddengine.origins").check()
    return getattr(import_module(_HOME[name]), name)
