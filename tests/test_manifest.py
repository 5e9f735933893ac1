"""Writing whole or not at all."""

import json

import pytest

from moecollab.errors import DataError, OutputExistsError, SchemaError
from moecollab.manifest import (
    MANIFEST,
    check_manifest,
    new_folder,
    read_json,
    write_bytes,
    write_json,
)


def test_file_is_whole_or_absent(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_json(target, {"b": 1.5, "a": [1]})
    assert json.loads(target.read_text()) == {"a": [1], "b": 1.5}
    with pytest.raises(OutputExistsError, match=r"a\.json exists"):
        write_json(target, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"a": float("nan")}, overwrite=True)
    assert json.loads(target.read_text())["b"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def break_inside(target):
    with new_folder(target, overwrite=True) as scratch:
        write_bytes(scratch / "x", b"new")
        raise RuntimeError("broken")


def test_folder_takes_its_place_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "result"
    with new_folder(target) as scratch:
        write_bytes(scratch / "x", b"old")
        write_json(scratch / MANIFEST, {})
        assert not target.exists()
    with pytest.raises(RuntimeError, match="broken"):
        break_inside(target)
    assert (target / "x").read_bytes() == b"old"
    with new_folder(target, overwrite=True) as scratch:
        write_bytes(scratch / "y", b"new")
    assert [p.name for p in target.iterdir()] == ["y"]
    with pytest.raises(DataError, match="did not make"), new_folder(target, overwrite=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    with pytest.raises(OutputExistsError), new_folder(target):
        pass


def test_old_folder_stays_when_the_new_one_cannot_be_placed(tmp_path, monkeypatch):
    target = tmp_path / "result"
    with new_folder(target) as scratch:
        write_bytes(scratch / "x", b"old")
        write_json(scratch / MANIFEST, {})
    with (
        pytest.raises(FileNotFoundError),
        new_folder(target, overwrite=True) as scratch,
    ):
        scratch.rmdir()
    assert (target / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b'{"a": ', DataError, "truncated"),
        (b"[1]", SchemaError, "expected an object"),
        (b"\xff\xfe", DataError, "not valid JSON"),
    ],
)
def test_damaged_json_is_one_sentence(tmp_path, content, error, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(error, match=message):
        read_json(tmp_path / "a.json")


def test_manifest_of_another_kind(tmp_path):
    with pytest.raises(SchemaError, match="holds plan version 2; expected activations version 1"):
        check_manifest({"kind": "plan", "format": 2}, "activations", 1, tmp_path)
