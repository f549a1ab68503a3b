"""Trackers: what a run logs to metrics.jsonl, in TensorBoard, MLflow or Weights & Biases too (`track=`).

metrics.jsonl is always written and is the truth; a tracker follows it. It opens with the first step that is
logged, is brought up to date from that log (a run that goes on, or that had no tracker before), and takes no
step twice. What it holds lies in RUN/tracking, and nothing leaves the machine unless MLFLOW_TRACKING_URI or
WANDB_MODE says so. A tracker that fails is left out with a notice; no result depends on one.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ddengine import files
from ddengine.errors import UsageError, require

FOLDER = "tracking"
PROJECT = "ddengine"  # the experiment of MLflow and the project of W&B where the environment names none
TEXT = 500  # characters of a setting's value that a tracker gets
Values = Mapping[str, float]
Tell = Callable[[int | None, Values], None]  # (step; None: the one after the last, values)


@runtime_checkable
class Tracker(Protocol):
    """Takes numbers by step. `last` is the last step that it holds, -1 for none."""

    last: int

    def log(self, step: int, values: Values) -> None:
        """Take the values of a step after the last."""
        ...

    def close(self, done: bool) -> None:
        """Write what is left; `done` says whether the run came to its end."""
        ...


class TensorBoard:
    """Event files in `folder`/tensorboard, flushed at every step for the sake of killed runs."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        place = str(folder / "tensorboard")
        held = EventAccumulator(place, {"scalars": 0})  # all of them
        if Path(place).is_dir():
            held.Reload()
        self.last = max((held.Scalars(key)[-1].step for key in held.Tags()["scalars"]), default=-1)
        self._writer = SummaryWriter(place)
        if self.last < 0:
            self._writer.add_text("settings", "\n".join(f"    {key}: {about[key]}" for key in about))

    def log(self, step: int, values: Values) -> None:
        """Write a scalar of each value."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()
        self.last = step

    def close(self, done: bool) -> None:
        """End the event file."""
        self._writer.close()


class MLflow:
    """One MLflow run, in `folder`/mlflow.db or where MLFLOW_TRACKING_URI says; resumed with its run."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        own = f"sqlite:///{folder / 'mlflow.db'}"
        place, memory = os.environ.get("MLFLOW_TRACKING_URI") or own, folder / "mlflow.json"
        self._client, self._metric = MlflowClient(tracking_uri=place), Metric
        if memory.exists():
            self._run = files.read_json(memory)["run"]
            self._client.update_run(self._run, status="RUNNING")
        else:
            artefacts = (folder / "mlflow").as_uri() if place == own else None
            experiment = _experiment(self._client, artefacts)
            self._run = self._client.create_run(experiment, run_name=folder.parent.name).info.run_id
            self._client.log_batch(self._run, params=[Param(key, str(about[key])[:TEXT]) for key in about])
            files.write_json(memory, {"run": self._run})
        held = self._client.get_run(self._run).data.metrics
        histories = (self._client.get_metric_history(self._run, key) for key in held)
        self.last = max((entry.step for history in histories for entry in history), default=-1)

    def log(self, step: int, values: Values) -> None:
        """Send all values of a step at once."""
        now = int(1000 * time.time())
        metrics = [self._metric(key, float(value), now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)
        self.last = step

    def close(self, done: bool) -> None:
        """Say whether the run came to its end."""
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


def _experiment(client: Any, artefacts: str | None) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    found = client.get_experiment_by_name(name)
    return (
        client.create_experiment(name, artifact_location=artefacts) if found is None else found.experiment_id
    )


class WandB:
    """One W&B run, offline in `folder`/wandb unless WANDB_MODE says otherwise; `wandb sync` sends it later.

    A run that goes on has the same id, in one more offline folder.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        import wandb

        self._memory = folder / "wandb.json"
        known = files.read_json(self._memory) if self._memory.exists() else {}
        self._id, self.last = known.get("run") or secrets.token_hex(4), int(known.get("step", -1))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.parent.name,
            id=self._id,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE") or "offline",
            resume="allow",
            config=dict(about),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def log(self, step: int, values: Values) -> None:
        """Log one step of the history."""
        self._run.log(dict(values), step=step)
        files.write_json(self._memory, {"run": self._id, "step": step})
        self.last = step

    def close(self, done: bool) -> None:
        """End the run, which writes what is still in memory."""
        self._run.finish(exit_code=0 if done else 1)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
NEEDS = {  # modules of each, and the extra that installs them
    "tensorboard": (("tensorboard", "torch.utils.tensorboard"), "track"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "mlflow"),
    "wandb": (("wandb",), "wandb"),
}
QUIET = {  # what else these packages would send or say, unless the user has set it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
}


def chosen(track: Any) -> tuple[str, ...]:
    """The trackers that `track` names: None, a name, or a list of names. Their packages are imported.

    Raises UsageError for an unknown name, and for one whose package is not installed.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    listed = [] if track is None else [track] if isinstance(track, str) else track
    if not isinstance(listed, Iterable):
        raise UsageError(f"track={track} names no tracker", f"Give one or a list of: {', '.join(TRACKERS)}")
    names = tuple(dict.fromkeys(listed))
    for name in names:
        require(name, TRACKERS, "track")
        modules, extra = NEEDS[name]
        lacking = [module for module in modules if find_spec(module) is None]
        if lacking:
            raise UsageError(
                f"track={name} needs {lacking[0]}, which is not installed",
                f'pip install "ddengine[{extra}]", or leave track out',
            )
        for module in modules:  # here, so that the seconds of a run are its own
            import_module(module)
    return names


def settings(config: Any, path: str = "") -> dict[str, Any]:
    """A configuration as one level of dotted keys, without what is None and what only hydra needs."""
    values = vars(config) if is_dataclass(config) else config
    found: dict[str, Any] = {}
    for key, value in values.items():
        if is_dataclass(value) or isinstance(value, Mapping):
            found |= settings(value, f"{path}{key}.")
        elif value is not None and key != "defaults":
            found[f"{path}{key}"] = value
    return found


@contextmanager
def following(
    names: Iterable[str], folder: Path, about: Mapping[str, Any], notice: Callable[[str], None]
) -> Iterator[Tell]:
    """Inside, what is told goes to the trackers `names` of the run in `folder`, after what its log has.

    `about` are settings that a tracker shows. Nothing is opened or written before something is told.
    """
    trackers: dict[str, Tracker | None] = {}

    def guarded(name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # foreign code: a tracker must not end a run
            trackers[name] = None
            said = (str(error).splitlines() or [""])[0][:TEXT]
            notice(f"note: track={name} stopped, the run goes on: {type(error).__name__} {said}")

    def to(name: str, step: int | None, values: Values) -> None:
        if name not in trackers:
            place = (folder / FOLDER).resolve()
            files.make_folder(place)
            trackers[name] = opened = TRACKERS[name](place, about)
            _catch_up(opened, folder / "metrics.jsonl")
        tracker = trackers[name]
        if tracker is not None and (step is None or step > tracker.last):
            tracker.log(tracker.last + 1 if step is None else step, values)

    def tell(step: int | None, values: Values) -> None:
        for name in names:
            guarded(name, lambda name=name: to(name, step, values))  # type: ignore[misc]

    done = False
    try:
        yield tell
        done = True
    finally:
        for name, tracker in list(trackers.items()):
            if tracker is not None:
                guarded(name, lambda tracker=tracker: tracker.close(done))  # type: ignore[misc]


def _catch_up(tracker: Tracker, log: Path) -> None:
    """Give a tracker the records of a run's log that it does not hold."""
    for record in files.read_json_lines(log):
        if record["step"] > tracker.last:
            values = {key: value for key, value in record.items() if key not in ("step", "seconds")}
            tracker.log(record["step"], values)
