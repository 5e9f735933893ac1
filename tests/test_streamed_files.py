"""Hostile folders, full disks, stopped runs: one sentence, and nothing is lost."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import models
from moecollab.errors import DataError, OutputExistsError, StaleInputError
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.headers import read_header, write_header
from moecollab.models.keep import Keep
from moecollab.pruning.pruning import prune
from moecollab.pruning.streaming import copying, folder, journal

EVEN = Keep(dict.fromkeys(range(3), (0, 2, 4, 6)), 8, 2)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    """A model in several files."""
    models.build("mixtral").save_pretrained(tmp_path / "base", max_shard_size="60kB")
    return tmp_path / "base"


def digest(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def written(path, header, data=b""):
    """A file with a header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start, end, *, dtype="U8", shape=None):
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "b overlaps another tensor"),
    "hole": ({"a": entry(0, 4), "b": entry(5, 8)}, 8, "b leaves a hole before it"),
    "hole at the start": ({"a": entry(2, 4)}, 4, "a leaves a hole"),
    "out of range": ({"a": entry(0, 40)}, 4, "less than its header says"),
    "behind the last": ({"a": entry(0, 4)}, 9, "5 bytes after its last tensor"),
    "backwards": ({"a": entry(4, 0, shape=[4])}, 4, "-4 bytes for"),
    "negative": ({"a": entry(-4, 0)}, 4, "not whole numbers from 0 up"),
    "huge": ({"a": entry(0, 0, shape=[0, 2**70])}, 0, "not whole numbers from 0 up"),
    "bytes": ({"a": entry(0, 4, dtype="F32", shape=[2])}, 4, "4 bytes for"),
    "type": ({"a": entry(0, 4, dtype="Q4")}, 4, "the type Q4, which is none of"),
    "shape": ({"a": entry(0, 4, shape=[True, 4])}, 4, "not whole numbers"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "data_offsets"),
    "no object": ([], 0, "is not JSON"),
    "no JSON": (b'{"a": ', 0, "its header says"),
    "no text": (b'{"\xff": 1}', 0, "its header says"),
    "deep": (b'{"a":' * 100_000, 0, "its header says"),
    "twice": (b'{"a":1,"a":1}', 0, "a twice"),
    "half a character": (b'{"\\ud800":' + json.dumps(entry(0, 0)).encode() + b"}", 0, "header"),
    "metadata": ({"__metadata__": {"format": 1}}, 0, "metadata that is not of strings"),
}


@pytest.mark.parametrize(("header", "n_bytes", "message"), HEADERS.values(), ids=HEADERS)
def test_hostile_headers(header, n_bytes, message, tmp_path):
    path = written(tmp_path / "model.safetensors", header, bytes(n_bytes))
    with pytest.raises(DataError, match=r"model\.safetensors is truncated or damaged") as caught:
        Checkpoint.open(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if message != "a twice":  # the reference library takes the last
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\x01\x00", "it has 2 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of"),
        (struct.pack("<Q", 100) + b"{}", "ends within its header"),
    ],
)
def test_files_that_end_early(data, message, base):
    first = sorted(base.glob("*.safetensors"))[0]
    first.write_bytes(data)
    with pytest.raises(DataError, match=message):
        prune(base, EVEN, out=base.parent / "small")
    assert left(base.parent) == ["base"]


def sample_file(folder):
    described = [("a", "F32", (2, 3)), ("b", "BF16", (5,)), ("c", "U8", (0, 4))]
    header, data = {}, b""
    for name, dtype, shape in described:
        size = {"F32": 4, "BF16": 2, "U8": 1}[dtype]
        for length in shape:
            size *= length
        header[name] = entry(len(data), len(data) + size, dtype=dtype, shape=list(shape))
        data += bytes(size)
    return written(folder / "x.safetensors", header, data)


@given(data=st.data())
def test_what_we_read_the_reference_library_reads(data, tmp_path_factory):
    path = sample_file(tmp_path_factory.mktemp("fuzz"))
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(held) - 1))
        kind = data.draw(st.sampled_from(["change", "digit", "insert", "delete", "cut"]))
        byte = data.draw(
            st.integers(0, 255) if kind == "change" else st.sampled_from(b'0123456789{}[],:"')
        )
        if kind in ("change", "digit"):
            held[at] = byte
        elif kind == "insert":
            held.insert(at, byte)
        elif kind == "delete" and len(held) > 1:
            del held[at]
        else:
            del held[at + 1 :]
    path.write_bytes(held)
    try:
        found, _ = read_header(path)
    except DataError:
        return
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(found)
        for name, stored in found.items():
            assert tuple(opened.get_slice(name).get_shape()) == stored.shape


def test_headers_are_written_as_the_reference_library_does(tmp_path):
    found = load_file(sample_file(tmp_path))
    save_file(found, tmp_path / "y.safetensors", metadata={"format": "pt", "b": "ü"})
    stored, metadata = read_header(tmp_path / "y.safetensors")
    described = ((name, one.dtype, one.shape) for name, one in stored.items())
    header = write_header(described, dict(metadata))
    named = json.loads(header[8:])["__metadata__"]
    assert named == {"format": "pt", "b": "ü"}
    assert len((tmp_path / "y.safetensors").read_bytes()) == len(header) + 24 + 10


def change_index(base, change):
    value = json.loads((base / INDEX).read_text())
    change(value["weight_map"])
    (base / INDEX).write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["../secret.safetensors", "{root}/secret.safetensors"])
def test_an_index_that_points_outside(name, base, tmp_path):
    name = name.format(root=tmp_path)
    shutil.copy(sorted(base.glob("*.safetensors"))[0], tmp_path / "secret.safetensors")
    change_index(base, lambda places: places.update({"x": name}))
    with pytest.raises(DataError, match=r"secret\.safetensors, which lies outside it"):
        prune(base, EVEN, out=tmp_path / "small")


def test_links_may_only_lead_into_the_cache_of_the_hub(base, tmp_path):
    cached = tmp_path / "models--a--b" / "snapshots" / "main"
    shutil.copytree(base, cached)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(cached.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    out = prune(cached, EVEN, out=tmp_path / "small")
    found, expected = digest(out), digest(prune(base, EVEN, out=tmp_path / "other"))
    told = expected.pop("README.md").replace(b'"base"', b'"a/b"').replace(b"`base`", b"`a/b`")
    assert found.pop("README.md") == told.replace(b"# base with", b"# a/b with")
    assert found == expected
    first = sorted(base.glob("*.safetensors"))[0]
    first.rename(tmp_path / "elsewhere.safetensors")
    first.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(DataError, match=rf"{first.name}, which lies outside it"):
        prune(base, EVEN, out=tmp_path / "third")


def test_a_missing_file_a_second_copy_and_a_wrong_place(base, tmp_path):
    places = json.loads((base / INDEX).read_text())["weight_map"]
    shared = next(file for file in places.values() if list(places.values()).count(file) > 1)
    files = sorted(base.glob("*.safetensors"), key=lambda file: (file.name != shared, file.name))
    name = next(key for key, file in places.items() if file == shared)
    change_index(base, lambda places: places.update({name: files[1].name}))
    with pytest.raises(DataError, match=rf"{files[1].name} in .* lacks the weight {name}"):
        prune(base, EVEN, out=tmp_path / "small")
    held = load_file(files[1]) | {name: load_file(files[0])[name]}
    save_file(held, files[1])
    with pytest.raises(DataError, match=rf"holds the weight {name} twice, in model"):
        prune(base, EVEN, out=tmp_path / "small")
    files[2].unlink()
    with pytest.raises(DataError, match=rf"lacks {files[2].name}, which its index names|twice"):
        prune(base, EVEN, out=tmp_path / "small")


@pytest.mark.parametrize("out", ["base", "base/small", "."])
def test_an_output_in_the_model_or_around_it(out, base, tmp_path):
    before = digest(base)
    with pytest.raises((DataError, OutputExistsError)):
        prune(base, EVEN, out=tmp_path / out)
    with pytest.raises(DataError, match=r"one folder or lie in each other|did not make"):
        prune(base, EVEN, out=tmp_path / out, overwrite=True)
    assert digest(base) == before


def test_an_output_that_exists(base, tmp_path):
    out = prune(base, EVEN, out=tmp_path / "small")
    before = digest(out)
    with pytest.raises(OutputExistsError):
        prune(base, EVEN, out=out)
    every = Keep(dict.fromkeys(range(3), tuple(range(8))), 8, 2)
    prune(base, every, out=out, overwrite=True)
    assert digest(out) != before
    assert left(tmp_path) == ["base", "small"]


class Stopped(BaseException):
    """Stands for a kill."""


def stop_after(monkeypatch, calls, error):
    """Lets so many pieces be copied, then fails; counts them."""
    real, made = os.copy_file_range, []

    def some(*arguments):
        made.append(arguments)
        if len(made) > calls:
            raise error
        return real(*arguments)

    monkeypatch.setattr(copying.os, "copy_file_range", some)
    return made


@pytest.fixture
def small_shards(base, tmp_path):
    """A pruning into many files, and what it writes."""

    def run(**settings):
        return prune(base, EVEN, out=tmp_path / "small", shard_size="20kB", **settings)

    whole = prune(base, EVEN, out=tmp_path / "whole", shard_size="20kB")
    return run, digest(whole)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, 30, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DataError, match=r"could not be written \(No space left.*what is done"):
            run()
    assert not (tmp_path / "small").exists()
    with monkeypatch.context() as patched:
        made = stop_after(patched, 10**9, OSError())
        run()
    again = len(made)
    with monkeypatch.context() as patched:
        made = stop_after(patched, 10**9, OSError())
        run(overwrite=True)
    assert 0 < again < len(made) - 15, "finished files were written again"
    assert digest(tmp_path / "small") == whole


def test_too_little_room_is_told_before_anything_is_written(base, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DataError, match=r"needs 0\.00 GB more in .*, which has 0\.00 GB left"):
        prune(base, EVEN, out=tmp_path / "small")
    assert left(tmp_path) == ["base"]


def test_a_place_that_cannot_be_written(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        prune(base, EVEN, out=tmp_path / "file" / "small")


@pytest.mark.parametrize("calls", [0, 1, 17, 40])
def test_a_stopped_run_goes_on(calls, small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, calls, Stopped())
        with pytest.raises(Stopped):
            run()
    run(verify=True)
    assert digest(tmp_path / "small") == whole
    assert left(tmp_path) == ["base", "small", "whole"]


def test_a_run_that_was_stopped_while_it_cleaned_up(small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        patched.setattr(journal.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            run()
    assert digest(tmp_path / "small") == whole
    run()
    assert digest(tmp_path / "small") == whole
    assert left(tmp_path) == ["base", "small", "whole"]


@pytest.mark.parametrize("damage", ["cut", "changed", "journal"])
def test_finished_files_that_changed_are_written_again(damage, small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, 40, Stopped())
        with pytest.raises(Stopped):
            run()
    place = tmp_path / ".small.partial"
    first = sorted((place / "model").glob("*.safetensors"))[0]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "changed":
        first.write_bytes(first.read_bytes()[:-1] + b"!")
    else:
        (place / "journal.json").write_text("{")
    run()
    assert digest(tmp_path / "small") == whole


def test_a_stopped_run_of_another_plan_is_told(small_shards, base, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, 40, Stopped())
        with pytest.raises(Stopped):
            run()
    odd = Keep(dict.fromkeys(range(3), (1, 3, 5, 7)), 8, 2)
    with pytest.raises(StaleInputError, match="stopped half way, with another plan; repeat it"):
        prune(base, odd, out=tmp_path / "small", shard_size="20kB")
    prune(base, odd, out=tmp_path / "small", shard_size="20kB", overwrite=True)
    assert digest(tmp_path / "small") != whole


def test_a_model_that_changes_while_it_is_read(small_shards, base, monkeypatch):
    run, _ = small_shards
    write = folder.write_shard

    def changing(*arguments):
        os.utime(sorted(base.glob("*.safetensors"))[0])
        write(*arguments)

    monkeypatch.setattr(folder, "write_shard", changing)
    with pytest.raises(StaleInputError, match="changed while it was read"):
        run()


def test_verify_finds_a_changed_byte(small_shards, monkeypatch):
    run, _ = small_shards
    write = folder.write_shard

    def wrong(shard, target, *arguments):
        write(shard, target, *arguments)
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(folder, "write_shard", wrong)
    with pytest.raises(DataError, match=r"not written as it was read: \S+ differs"):
        run(verify=True)


def test_file_systems_that_cannot_copy_in_the_kernel(small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    stop_after(monkeypatch, 0, OSError(errno.EXDEV, "Invalid cross-device link"))
    monkeypatch.setattr(copying, "_BUFFER", 1000)
    run(verify=True)
    assert digest(tmp_path / "small") == whole


def between_samples(file):
    """Changes one byte that no sample of the journal sees."""
    data = bytearray(file.read_bytes())
    last = len(data) - 64
    data[last * 30 // 63 + 64 + 5] ^= 255
    file.write_bytes(data)


@pytest.fixture
def damaged(small_shards, tmp_path, monkeypatch):
    """A run that was killed before it verified, then two of its files damaged unseen."""
    run, whole = small_shards
    monkeypatch.setattr(copying, "_SAMPLE", 64)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "compare", lambda *_: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            run(verify=True)
    for file in sorted((tmp_path / ".small.partial" / "model").glob("*.safetensors"))[:2]:
        between_samples(file)
    with pytest.raises(DataError, match="not written as it was read"):
        run(verify=True)
    return run, whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_verify_refused_is_written_again(overwrite, damaged, tmp_path):
    run, whole = damaged
    run(verify=True, overwrite=overwrite)
    assert digest(tmp_path / "small") == whole


def test_overwrite_starts_over_and_a_killed_overwrite_goes_on(small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    copied = []
    for settings in ({}, {"overwrite": True}, {"overwrite": True}):
        with monkeypatch.context() as patched:
            made = stop_after(patched, 25, Stopped())
            with pytest.raises(Stopped):
                run(**settings)
        files = (tmp_path / ".small.partial" / "model").glob("*.safetensors")
        copied.append((len(made), len(list(files))))
    assert copied[1] == copied[0], "it started over"
    assert copied[2][1] > copied[1][1], "it went on"
    run(overwrite=True)
    assert digest(tmp_path / "small") == whole


def test_a_run_that_was_stopped_while_it_cleaned_up_is_verified(
    small_shards, tmp_path, monkeypatch
):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        patched.setattr(journal.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            run()
    between_samples(sorted((tmp_path / "small").glob("*.safetensors"))[0])
    with pytest.raises(DataError, match="not written as it was read"):
        run(verify=True)
    with pytest.raises(OutputExistsError):
        run(verify=True)
    run(verify=True, overwrite=True)
    assert digest(tmp_path / "small") == whole
    assert left(tmp_path) == ["base", "small", "whole"]


def test_a_stopped_run_goes_on_by_a_relative_path(small_shards, base, tmp_path, monkeypatch):
    run, whole = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, 40, Stopped())
        with pytest.raises(Stopped):
            run()
    monkeypatch.chdir(tmp_path)
    prune(base.name, EVEN, out="small", shard_size="20kB")
    assert digest(tmp_path / "small") == whole


def test_an_unfinished_file_takes_no_room(small_shards, tmp_path, monkeypatch):
    run, _ = small_shards
    with monkeypatch.context() as patched:
        stop_after(patched, 40, Stopped())
        with pytest.raises(Stopped):
            run()
    unfinished = tmp_path / ".small.partial" / "unfinished"
    assert unfinished.exists()
    real, seen = shutil.disk_usage, []
    monkeypatch.setattr(
        folder.shutil, "disk_usage", lambda path: seen.append(unfinished.exists()) or real(path)
    )
    run()
    assert seen == [False]


def test_systems_without_the_calls_of_linux(small_shards, tmp_path, monkeypatch):
    run, whole = small_shards
    for name in ("posix_fadvise", "copy_file_range"):
        monkeypatch.delattr(copying.os, name)
    run(verify=True)
    assert digest(tmp_path / "small") == whole
