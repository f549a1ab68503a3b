import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.seals import read_sealed, write_sealed

KNOWN = ("a", "b", "rows")
VALUE = {"rows": [{"mean": 0.1, "n": 5}], "a": "text", "b": None}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=7,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text().filter(lambda key: key != "seal"), PLAIN, max_size=5))
def test_what_was_sealed_comes_back_as_it_was(tmp_path, value):
    write_sealed(tmp_path / "a.json", value)
    assert read_sealed(tmp_path / "a.json", ()) == value


def test_every_single_bit_and_every_cut_of_a_sealed_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, VALUE)
    whole = path.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
        for i in range(len(whole))
        for bit in range(8)
    ]
    for damaged in (*flipped, *(whole[:length] for length in range(len(whole))), whole + b" "):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"a\.json is damaged"):
            read_sealed(path, KNOWN)


def test_the_same_values_spelled_otherwise_are_refused(tmp_path):
    write_sealed(tmp_path / "a.json", VALUE)
    (tmp_path / "a.json").write_text(json.dumps(files.read_json(tmp_path / "a.json")))
    with pytest.raises(ArtefactError, match="its text was changed after it was sealed"):
        read_sealed(tmp_path / "a.json", KNOWN)


def test_a_file_from_before_there_were_seals_is_read_if_its_keys_are_known(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUE))
    assert read_sealed(path, KNOWN) == VALUE
    with pytest.raises(ArtefactError, match="a.json is damaged: it has the unknown key 'b'"):
        read_sealed(path, ("a", "rows"))
    path.write_text('{"a": 1, "rows": [{"n": 1, "n": 2}]}')
    with pytest.raises(ArtefactError, match="a.json is damaged: a key comes twice"):
        read_sealed(path, KNOWN)


def test_a_value_that_is_no_table_is_left_to_the_reader(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_sealed(tmp_path / "a.json", KNOWN) == [1]
