"""Trackers hold what metrics.jsonl holds, each step once, and change nothing of a run."""

import json
import struct
import time

import pytest

from ddengine import cli, files, tracking
from ddengine.errors import UsageError

SMALL = [
    "dataset=digits", "ipc=1", "matcher=attention", "matcher.steps=30", "matcher.real_per_class=5",
    "network.width=3", "network.depth=2",
]  # fmt: skip


class Memory:
    """A tracker that outlives its run, as a store does."""

    def __init__(self, held, broken_at=None):
        self.held, self.broken_at, self.closed = held, broken_at, []

    @property
    def last(self):
        return max((step for step, _ in self.held), default=-1)

    def log(self, step, values):
        if step == self.broken_at:
            raise OSError("no server\nsecond line")
        self.held.append((step, dict(values)))

    def close(self, done):
        self.closed.append(done)


@pytest.fixture
def memory(monkeypatch):
    made = Memory([])
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", lambda folder, about: made)
    return made


def write_log(folder, steps):
    for step in steps:
        record = {"step": step, "seconds": 0.5, "loss": 1 / step}
        files.append_json_line(folder / "metrics.jsonl", record)


def follow(folder, notes, told, names=("tensorboard",)):
    with tracking.following(names, folder, {"seed": 7}, notes.append) as tell:
        for step, values in told:
            tell(step, values)


def test_a_tracker_is_brought_up_to_the_log_and_takes_no_step_twice(memory, tmp_path):
    write_log(tmp_path, [10, 20])
    follow(tmp_path, [], [(20, {"loss": 1 / 20}), (30, {"loss": 3.0})])
    assert memory.held == [(10, {"loss": 0.1}), (20, {"loss": 0.05}), (30, {"loss": 3.0})]
    follow(tmp_path, [], [(20, {"loss": 1 / 20}), (30, {"loss": 3.0}), (40, {"loss": 4.0})])
    assert [step for step, _ in memory.held] == [10, 20, 30, 40]


def test_values_without_a_step_come_after_the_last(memory, tmp_path):
    write_log(tmp_path, [10])
    follow(tmp_path, [], [(None, {"mean": 0.5}), (None, {"mean": 0.25})])
    assert memory.held == [(10, {"loss": 0.1}), (11, {"mean": 0.5}), (12, {"mean": 0.25})]


def test_a_tracker_that_fails_is_left_out_and_said_once(memory, tmp_path):
    memory.broken_at, notes = 2, []
    follow(tmp_path, notes, [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0})])
    assert memory.held == [(1, {"a": 1.0})]
    assert notes == ["note: track=tensorboard stopped, the run goes on: OSError no server"]


def test_a_run_that_fails_is_closed_as_not_done(memory, tmp_path):
    def told():
        yield 1, {"a": 1.0}
        raise UsageError("the run failed", "again")

    with pytest.raises(UsageError, match="the run failed"):
        follow(tmp_path, [], told())
    follow(tmp_path, [], [(2, {"a": 1.0})])
    assert memory.closed == [False, True]


def test_nothing_is_opened_before_something_is_told(memory, tmp_path):
    follow(tmp_path, [], [])
    assert memory.closed == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("track", "names"), [(None, ()), ("tensorboard", ("tensorboard",)), ([], ())])
def test_trackers_are_chosen_by_name(track, names):
    assert tracking.chosen(track) == names


def test_a_name_given_twice_is_one_tracker():
    assert tracking.chosen(["tensorboard", "tensorboard"]) == ("tensorboard",)


@pytest.mark.parametrize("track", ["tensorbord", ["wandb", "tensorbord"], 3])
def test_what_names_no_tracker_is_refused(track, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    monkeypatch.setattr(tracking, "import_module", lambda name: None)
    with pytest.raises(UsageError, match=r"tensorb|names no tracker"):
        tracking.chosen(track)


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "track"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_is_one_line_with_its_remedy(name, extra, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    code = cli.main(["distill", *SMALL, f"track={name}", f"out={tmp_path / 'run'}"], pinned=False)
    said = capsys.readouterr().err
    assert code == 2 and f"track={name} needs" in said and f'pip install "ddengine[{extra}]"' in said
    assert not (tmp_path / "run").exists()


def test_settings_are_dotted_keys_without_what_is_not_set():
    from ddengine.config import BudgetConfig, DistillConfig

    found = tracking.settings(DistillConfig(dataset={"name": "digits"}, ipc=3, budget=BudgetConfig(5)))
    assert found["dataset.name"] == "digits" and found["ipc"] == 3 and found["budget.nbytes"] == 5
    assert found["network.name"] == "convnet"
    assert not {"out", "defaults", "network.width"} & set(found)


def scalars(folder):
    found = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    held = found.EventAccumulator(str(folder / "tracking" / "tensorboard"), {"scalars": 0})
    held.Reload()
    return {key: [(e.step, e.value) for e in held.Scalars(key)] for key in held.Tags()["scalars"]}


def logged(folder):
    return list(files.read_json_lines(folder / "metrics.jsonl"))


def test_tensorboard_holds_a_runs_log_and_its_evaluation_and_changes_no_bit(tmp_path):
    pytest.importorskip("tensorboard")
    runs = tmp_path / "plain", tmp_path / "tracked"
    assert cli.main(["distill", *SMALL, f"out={runs[0]}"], pinned=False) == 0
    assert cli.main(["distill", *SMALL, f"out={runs[1]}", "track=tensorboard"], pinned=False) == 0
    data = [(run / "distilled" / "data.safetensors").read_bytes() for run in runs]
    assert data[0] == data[1]
    records, found = logged(runs[1]), scalars(runs[1])
    assert [step for step, _ in found["loss"]] == [10, 20, 30]
    assert [value for _, value in found["loss"]] == pytest.approx([r["loss"] for r in records], rel=1e-6)
    words = ["rows=[random]", "seeds=1", "recipe.steps=3", "recipe.lrs=[0.01]", "workers=1"]
    words += ["track=[tensorboard]", "kept=none"]
    assert cli.main(["evaluate", str(runs[1]), *words], pinned=False) == 0
    table = json.loads((runs[1] / "table.json").read_text())
    for row in table["rows"]:
        ((step, value),) = scalars(runs[1])[f"convnet/{row['name']}"]
        assert step == 31 and value == pytest.approx(row["mean"], abs=1e-6)


def test_a_resumed_run_repeats_no_step_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    write_log(tmp_path, [10, 20])
    follow(tmp_path, [], [(20, {"loss": 1 / 20}), (30, {"loss": 1 / 30})])
    follow(tmp_path, [], [(30, {"loss": 1 / 30}), (40, {"loss": 1 / 40})])
    held = scalars(tmp_path)["loss"]
    assert len(held) == 4 and dict(held) == pytest.approx({s: 1 / s for s in (10, 20, 30, 40)})
    assert len(list((tmp_path / "tracking" / "tensorboard").iterdir())) == 2


def test_a_buffer_shows_where_its_experts_ended(memory, tmp_path):
    words = ["dataset=digits", "network.width=3", "network.depth=1", "count=2", "max_start_epoch=1"]
    words += ["expert_epochs=1", "workers=1", f"out={tmp_path / 'buffer'}", "track=tensorboard"]
    assert cli.main(["buffer", *words], pinned=False) == 0
    entries = json.loads((tmp_path / "buffer" / "manifest.json").read_text())["experts"]
    assert memory.held == [
        (i, {"loss": entries[str(i)]["loss"], "accuracy": entries[str(i)]["accuracy"]}) for i in (0, 1)
    ]
    assert cli.main(["verify", str(tmp_path / "buffer")], pinned=False) == 0


def test_tracking_an_evaluation_needs_a_folder(tmp_path, capsys):
    words = ["dataset=digits", "ipc=1", "matcher=random", f"out={tmp_path / 'run'}"]
    assert cli.main(["distill", *words], pinned=False) == 0
    moved = (tmp_path / "run" / "distilled").rename(tmp_path / "alone")
    assert cli.main(["evaluate", str(moved), "track=tensorboard", "dataset=digits"], pinned=False) == 2
    assert "Give out=DIR" in capsys.readouterr().err


def test_mlflow_holds_each_step_once_in_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for module in tracking.NEEDS["mlflow"][0]:
        pytest.importorskip(module)
    tracking.chosen("mlflow")
    from mlflow import MlflowClient

    notes = []
    write_log(tmp_path, [10, 20])
    follow(tmp_path, notes, [(20, {"loss": 1 / 20})], ["mlflow"])
    follow(tmp_path, notes, [(20, {"loss": 1 / 20}), (30, {"loss": 1 / 30, "rate": 2.0})], ["mlflow"])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/tracking/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ddengine").experiment_id])
    held = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert notes == [] and len(held) == 3
    assert dict(held) == pytest.approx({10: 0.1, 20: 0.05, 30: 1 / 30})
    assert run.data.params == {"seed": "7"} and run.data.metrics["rate"] == 2.0
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name


def wandb_history(path, record_type):
    """Steps and losses of an offline W&B file: a head of 7 bytes, then records in blocks of 32 KiB, each
    record of one or more pieces with a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last).
    """
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = record_type()
            record.ParseFromString(whole)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found += [(items["_step"], items["loss"])] if items else []
    return found


def test_wandb_holds_each_step_once_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracking.chosen("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    notes = []
    write_log(tmp_path, [10, 20])
    follow(tmp_path, notes, [(20, {"loss": 1 / 20})], ["wandb"])
    follow(tmp_path, notes, [(20, {"loss": 1 / 20}), (30, {"loss": 1 / 30})], ["wandb"])
    places = list((tmp_path / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))
    held, until = [], time.monotonic() + 20
    while len(held) < 3 and time.monotonic() < until:  # W&B's own process may write a moment later
        held = sorted(pair for place in places for pair in wandb_history(place, Record))
        time.sleep(0.1)
    assert notes == [] and len(held) == 3
    assert dict(held) == pytest.approx({10: 0.1, 20: 0.05, 30: 1 / 30})
    assert len({place.name for place in places}) == 1  # one run
