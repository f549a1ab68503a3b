"""Archives of torch.save are read where they hold tensors and numbers, and refused before they do more."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from foreign_sets import Attack, repacked

from ddengine.archives import (
    NUMPY_SCALARS,
    STORAGES,
    TENSORS,
    check_archive,
    is_dense,
    load_archive,
    reason_of,
)

ALLOWED = TENSORS | STORAGES
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def read(path, **options):
    return load_archive(path, ALLOWED, limit=1 << 20, **options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
)
def test_plain_tensors_come_back_with_their_types(path, dtype):
    content = {"a": [torch.arange(6).reshape(2, 3).to(dtype), 1.5, "text"], "b": (None, True)}
    found = read(saved(path, content))
    assert torch.equal(found["a"][0], content["a"][0]) and found["a"][0].dtype == dtype
    assert found["a"][1:] == [1.5, "text"] and found["b"] == (None, True)


NUMBERS = [np.float64(0.1), np.float32(0.1), np.float16(0.1), np.int64(-(2**40)), np.int32(-5), np.bool_(1)]


@pytest.mark.parametrize("number", [*NUMBERS, np.array(0.1, ">f8")[()]])
def test_scalars_of_numpy_come_back_as_plain_numbers(path, number):
    found = read(saved(path, [number]), stand_ins=NUMPY_SCALARS)
    assert found == [number.item()] and type(found[0]) in (float, int, bool)


def test_scalars_written_by_an_old_numpy_are_read(path):
    """numpy before 2 calls its module numpy.core."""
    repacked(
        saved(path, [np.float64(0.25)]), lambda n, d: (n, d.replace(b"numpy._core.", b"numpy.core."), STORED)
    )
    assert read(path, stand_ins=NUMPY_SCALARS) == [0.25]


def test_stand_ins_are_allowed_for_one_reading_alone(path):
    before = set(torch.serialization.get_safe_globals())
    read(saved(path, [np.float64(0.25)]), stand_ins=NUMPY_SCALARS)
    with pytest.raises(ValueError, match="it refers to numpy._core.multiarray scalar"):
        read(path)
    assert set(torch.serialization.get_safe_globals()) == before  # their order is nobody's


def test_objects_and_texts_of_numpy_are_refused(path):
    for scalar in (np.str_("text"), np.datetime64("2020-01-01"), np.complex128(1)):
        with pytest.raises(Exception, match="no number"):
            read(saved(path, [scalar]), stand_ins=NUMPY_SCALARS)


def test_code_is_refused_by_name_and_does_not_run(path, tmp_path):
    target = tmp_path / "ran"
    with pytest.raises(ValueError, match="it refers to posix system"):
        read(saved(path, Attack(target)))
    with pytest.raises(ValueError, match="instruction STACK_GLOBAL"):
        read(saved(path, Attack(target), pickle_protocol=4))
    path.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(ValueError, match="it is not a zip archive"):
        read(path)
    assert not target.exists()


def test_a_file_of_torch_before_1_6_is_refused_with_the_way_to_convert_it(path):
    saved(path, torch.zeros(3), _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="a file of torch before 1.6: load and save it again with a newer"):
        check_archive(path, ALLOWED, 1 << 20)


REPACKED = {
    "compressed or encrypted": lambda n, d: (n, d, DEFLATED),
    "outside the archive's folder": lambda n, d: (n.replace("/data/0", "/../0"), d, STORED),
    "outside the archive": lambda n, d: (n.replace("file/data/0", "other/0"), d, STORED),
    "program of TorchScript": lambda n, d: (n.replace("data/0", "constants.pkl"), d, STORED),
}


@pytest.mark.parametrize("said", REPACKED)
def test_archives_that_torch_does_not_write_are_refused(path, said):
    repacked(saved(path, torch.zeros(3)), REPACKED[said])
    with pytest.raises(ValueError, match=said):
        check_archive(path, ALLOWED, 1 << 20)


def test_a_member_that_comes_twice_and_a_comment_are_refused(path):
    saved(path, torch.zeros(3))
    whole = path.read_bytes()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(ValueError, match="table of members"):
        check_archive(path, ALLOWED, 1 << 20)
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"more"
    with pytest.raises(ValueError, match="table of members"):
        check_archive(path, ALLOWED, 1 << 20)


def test_a_file_beyond_the_limit_is_refused(path):
    with pytest.raises(ValueError, match=r"it has \d+ bytes, more than 100"):
        check_archive(saved(path, torch.zeros(30)), ALLOWED, 100)


def test_a_tensor_that_repeats_its_numbers_is_not_dense():
    assert is_dense(torch.zeros(7, 3)) and is_dense(torch.zeros(7, 3).T) and is_dense(torch.zeros(0, 5))
    assert not is_dense(torch.zeros(1).expand(2**20, 2**20))
    assert not is_dense(torch.eye(3).to_sparse())


def test_the_reason_of_an_error_is_one_printable_line():
    assert reason_of(ValueError("first\nsecond")) == "first"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(ValueError("\x1b[31mred")) == "\\x1b[31mred"
