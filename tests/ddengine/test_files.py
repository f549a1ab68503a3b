"""Files are written whole or not at all, and nothing damaged is read."""

import errno
import json
import os
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddengine import files
from ddengine.errors import ArtefactError, UsageError

TENSORS = {
    "a": torch.arange(21).reshape(3, 7),
    "half": torch.linspace(-1, 1, 5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(float("nan")),
    "flag": torch.tensor([True, False]),
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SHARED_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@SHARED_FOLDER
@given(VALUES)
def test_json_comes_back_as_it_was(tmp_path, value):
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert names(tmp_path) == ["a.json"]


def test_a_write_replaces_the_whole_file_with_the_usual_rights(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"longer than what comes")
    files.write_bytes(path, b"short")
    mask = os.umask(0)
    os.umask(mask)
    assert path.read_bytes() == b"short" and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert names(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(
                UsageError, match=r"cannot write .*a \(3 bytes\): No space left on device\nChoose"
            ):
                files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def failing(number, after=0):
    """Fails as the system does, from call `after` on; a write has then done half of its work."""
    calls = []

    def fail(real):
        def called(*args, **named):
            calls.append(real.__name__)
            if len(calls) <= after:
                return real(*args, **named)
            if real is WRITE:
                real(args[0], memoryview(args[1])[: len(args[1]) // 2])
            raise OSError(number, os.strerror(number))

        return called

    return fail


WRITE = os.write
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("phase", ["open", "write", "fsync", "replace"])
def test_a_refusal_at_any_phase_names_path_and_bytes_and_leaves_all_as_it_was(
    tmp_path, monkeypatch, phase, number
):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for write in (lambda: files.write_bytes(path, b"newer"), lambda: files.write_json(path, 1234)):
        with monkeypatch.context() as patch:
            patch.setattr(os, phase, failing(number)(getattr(os, phase)))
            with pytest.raises(UsageError) as caught:
                write()
        assert caught.value.cause == f"cannot write {path} (5 bytes): {os.strerror(number)}"
        assert "free some, then repeat the command" in caught.value.remedy
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]
    files.write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("phase", ["open", "write", "fsync"])
def test_a_log_that_is_refused_at_any_phase_is_as_it_was(tmp_path, monkeypatch, phase, number):
    path = tmp_path / "log.jsonl"
    files.append_json_line(path, {"step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, phase, failing(number)(getattr(os, phase)))
        with pytest.raises(
            UsageError, match=rf"cannot append to .*log\.jsonl \(12 bytes\): {os.strerror(number)}"
        ):
            files.append_json_line(path, {"step": 1})
    assert path.read_text() == '{"step": 0}\n'
    files.append_json_line(path, {"step": 1})
    assert [record["step"] for record in files.read_json_lines(path)] == [0, 1]


def test_a_write_that_the_system_cuts_short_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda handle, data: WRITE(handle, data[:7]))
    files.write_bytes(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_a_folder_that_cannot_be_flushed_on_its_own_is_no_failure_and_a_full_one_is(tmp_path, monkeypatch):
    for number in (errno.EINVAL, errno.EIO):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(number, after=1)(os.fsync))
            if number == errno.EINVAL:
                files.write_bytes(tmp_path / "a", b"1")
                continue
            with pytest.raises(UsageError, match="Input/output error"):
                files.write_bytes(tmp_path / "a", b"2")


def test_two_names_change_places_at_one_stroke_or_not_at_all(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said").write_text(name)
    done = files.exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "said").read_text() == ("two" if done else "one")
    with pytest.raises(OSError, match="No such file"):
        files.exchange(tmp_path / "one", tmp_path / "missing")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot create the folder .*file/below"):
        files.make_folder(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="cannot write"):
        files.write_bytes(tmp_path / "missing" / "a", b"")


def test_infinity_is_no_json(tmp_path):
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(ValueError, match="JSON"):
            files.write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}x", b"[" * 100_000])
def test_damaged_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"a\.json is damaged: not JSON"):
        files.read_json(tmp_path / "a.json")


def test_missing_and_oversized_json_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ArtefactError, match=r"cannot read .*a\.json: No such file"):
        files.read_json(tmp_path / "a.json")
    monkeypatch.setattr(files, "JSON_LIMIT", 10)
    (tmp_path / "a.json").write_text('"12345678901"')
    with pytest.raises(ArtefactError, match="larger than 10 bytes"):
        files.read_json(tmp_path / "a.json")


def test_tensors_come_back_bit_for_bit(tmp_path):
    entry = files.write_tensors(tmp_path / "t", TENSORS)
    assert entry == {"sha256": files.sha256(tmp_path / "t"), "bytes": (tmp_path / "t").stat().st_size}
    read = files.read_tensors(tmp_path / "t", entry)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(
            read[name].nan_to_num(7), tensor.nan_to_num(7)
        ), name


def test_views_strides_and_shared_storage_are_written_by_value(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    given = {"base": base, "same": base, "view": base[1:, ::2], "turned": base.permute(2, 0, 1)}
    read = files.read_tensors(tmp_path / "t", files.write_tensors(tmp_path / "t", given))
    assert all(torch.equal(read[name], tensor) for name, tensor in given.items())


@SHARED_FOLDER
@given(st.integers(0), st.integers(0, 7))
def test_any_changed_bit_of_a_tensor_file_is_found(tmp_path, place, bit):
    entry = files.write_tensors(tmp_path / "t", {"a": torch.arange(7.0)})
    data = bytearray((tmp_path / "t").read_bytes())
    data[place % len(data)] ^= 1 << bit
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ArtefactError, match="is damaged: its SHA-256"):
        files.read_tensors(tmp_path / "t", entry)


def test_cut_linked_and_missing_tensor_files_are_refused(tmp_path):
    path = tmp_path / "t"
    entry = files.write_tensors(path, TENSORS)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ArtefactError, match="damaged"):
        files.read_tensors(tmp_path / "link", entry)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ArtefactError, match=rf"{entry['bytes'] - 1} bytes where the manifest says {entry['bytes']}"
    ):
        files.read_tensors(path, entry)
    path.unlink()
    with pytest.raises(ArtefactError, match="cannot read"):
        files.read_tensors(path, entry)


@pytest.mark.parametrize("entry", [{}, {"bytes": 4}, {"bytes": "4", "sha256": 3}])
def test_a_manifest_entry_that_is_none_is_refused(tmp_path, entry):
    (tmp_path / "t").write_bytes(b"1234")
    with pytest.raises(ArtefactError, match="damaged"):
        files.read_tensors(tmp_path / "t", entry)


def test_a_file_with_the_right_hash_that_holds_no_tensors_is_refused(tmp_path):
    files.write_bytes(tmp_path / "t", b"no tensors")
    with pytest.raises(ArtefactError, match="damaged"):
        files.read_tensors(tmp_path / "t", {"bytes": 10, "sha256": files.sha256(tmp_path / "t")})


def test_a_log_gives_back_its_records_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    assert list(files.read_json_lines(path)) == []
    records = [{"step": i, "text": "a\nb", "value": i / 3} for i in range(5)]
    for record in records:
        files.append_json_line(path, record)
    assert list(files.read_json_lines(path)) == records
    assert path.read_text().count("\n") == 5


def test_a_log_cut_anywhere_loses_its_last_record_only(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"step": i} for i in range(3)]
    for record in records:
        files.append_json_line(path, record)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        whole = data[:end].count(b"\n")
        assert list(files.read_json_lines(path)) == records[:whole]
        files.append_json_line(path, {"step": "new"})
        assert list(files.read_json_lines(path)) == [*records[:whole], {"step": "new"}]


def test_a_damaged_record_is_named_by_its_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for damaged in (b'{"step": 1\n', b"7\n", b"\n", b"\xff\n"):
        path.write_bytes(b'{"step": 0}\n' + damaged + b'{"step": 2}\n')
        with pytest.raises(ArtefactError, match=r"log\.jsonl, line 2 is damaged"):
            list(files.read_json_lines(path))


def test_numbers_that_are_not_finite_are_not_logged(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_json_line(path, {"step": 0})
    with pytest.raises(ValueError, match="JSON"):
        files.append_json_line(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"step": 0}


def test_appending_below_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot append to .*log"):
        files.append_json_line(tmp_path / "missing" / "log.jsonl", {})
