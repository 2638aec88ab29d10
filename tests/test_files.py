"""runtime/files.py: a fault of a file is a ValueError of one line, and what is written appears whole or not at all."""
import errno
import hashlib
import json
import lzma
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime import files


class Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(read, path, fault):
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert fault in message and str(path) in message and "\n" not in message


# ---------------------------------------------------------------------------------------------------------------------
# reading

@pytest.mark.parametrize("array", [np.arange(7), np.ones((3, 4), np.float32).T, np.zeros(0, np.uint16), np.float64(3),
                                   np.eye(2, dtype=">f4")], ids=str)
def test_arrays_come_back_and_cannot_be_written_to(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = files.read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


@pytest.mark.parametrize("array", [np.array([True]), np.array(["a"]), np.array([1j]), np.zeros(2, "M8[s]"),
                                   np.zeros(2, [("a", "u2")])], ids=lambda array: str(array.dtype))
def test_arrays_of_other_things_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    refused(files.read_array, tmp_path / "a.npy", "not an array of numbers")


def test_no_array_is_unpickled(tmp_path):
    ran = tmp_path / "ran"
    np.save(tmp_path / "objects.npy", np.array([Runs(ran)], object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Runs(ran)))
    for name in ("objects.npy", "pickle.npy"):
        refused(files.read_array, tmp_path / name, "cannot be read")
    assert not ran.exists()
    np.load(tmp_path / "objects.npy", allow_pickle=True)  # which does run it
    assert ran.exists()


@pytest.mark.parametrize("change, fault", [
    (lambda raw: raw[:-1], "cannot be read"), (lambda raw: raw + b"\0", "209 bytes, its header says 208"),
    (lambda raw: raw[:50], "cannot be read"), (lambda raw: b"", "cannot be read"),
    (lambda raw: raw.replace(b"(10,)", b"(-1,)"), "cannot be read"),
    (lambda raw: raw.replace(b"(10,), }           ", b"(9999999999999,), }"), "cannot be read")],
    ids=["truncated", "too long", "half a header", "empty", "negative", "huge"])
def test_damaged_arrays(tmp_path, change, fault):
    np.save(tmp_path / "a.npy", np.arange(10))
    (tmp_path / "a.npy").write_bytes(change((tmp_path / "a.npy").read_bytes()))
    refused(files.read_array, tmp_path / "a.npy", fault)


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.read_json, files.read_array,
                                  files.read_tensors, lambda path: files.read_csv(path, ["a"])])
def test_missing_files_and_folders(tmp_path, read):
    for path in (tmp_path / "none", tmp_path):
        refused(read, path, "cannot be read")


def test_text_is_utf8_and_may_be_compressed(tmp_path):
    (tmp_path / "a.txt").write_text("漢 é", encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("漢 é".encode()))
    assert files.read_text(tmp_path / "a.txt") == files.read_text(tmp_path / "a.txt.xz") == "漢 é"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(files.read_text, tmp_path / "a.txt", "UnicodeDecodeError")
    whole = (tmp_path / "a.txt.xz").read_bytes()
    for damaged in (whole[:-1], b"no xz"):
        (tmp_path / "a.txt.xz").write_bytes(damaged)
        refused(files.read_text, tmp_path / "a.txt.xz", "cannot be read")


@pytest.mark.parametrize("compress", [bytes, lzma.compress])
def test_large_files_are_refused_by_their_unpacked_size(tmp_path, compress):
    path = tmp_path / ("a" if compress is bytes else "a.xz")
    path.write_bytes(compress(b" " * 1000))
    assert len(files.read_bytes(path, limit=1000)) == 1000
    refused(lambda path: files.read_bytes(path, limit=999), path, "more than 999 bytes")


@pytest.mark.parametrize("raw, kinds", [(b'{"a": [1, null]}', ()), (b"\xef\xbb\xbf{}", ()), (b"[1]", (list,)),
                                        (b"3", (int, list))])
def test_json_of_the_wanted_types(tmp_path, raw, kinds):
    (tmp_path / "a.json").write_bytes(raw)
    assert files.read_json(tmp_path / "a.json", *kinds) == json.loads(raw.decode("utf-8-sig"))


@pytest.mark.parametrize("raw, fault", [
    (b"", "JSONDecodeError"), (b'{"a": 1', "JSONDecodeError"), (b'{"a": NaN}', "NaN is no json"),
    (b'{"a": -Infinity}', "-Infinity is no json"), (b'"\xff"', "UnicodeDecodeError"), (b"[1]", "a list, not a dict"),
    (b"[" * 100_000, "RecursionError"), (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    (b"null", "a NoneType, not a dict")])
def test_json_that_is_refused(tmp_path, raw, fault):
    (tmp_path / "a.json").write_bytes(raw)
    refused(files.read_json, tmp_path / "a.json", fault)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b,c\n1,"x, ""y""\nz",3\n\n4,5,6\n')
    assert files.read_csv(path, ["b", "a"]) == [(3, dict(a="1", b='x, "y"\nz', c="3")), (5, dict(a="4", b="5", c="6"))]
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(path.read_bytes()))
    assert files.read_csv(tmp_path / "a.csv.xz", ["a"]) == files.read_csv(path, ["a"])


@pytest.mark.parametrize("text, fault", [
    ("", "no one column a; it needs a, b"), ("a,c\n1,2\n", "no one column b"), ("a,b,b\n1,2,3\n", "no one column b"),
    ("a,b\n", "no items"), ("a,b\n1,2\n3\n", ":3: 1 fields, 2 columns"), ('a,b\n1,"2\n', ":2: no csv"),
    ("a,b\n1," + "2" * 200_000, ":2: no csv")])
def test_csv_that_is_refused(tmp_path, text, fault):
    (tmp_path / "a.csv").write_text(text)
    refused(lambda path: files.read_csv(path, ["a", "b"]), tmp_path / "a.csv", fault)


def test_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = dict(a=torch.randn(2, 3), b=torch.ones(2, dtype=torch.bfloat16), c=torch.ones(1, dtype=torch.float16),
                   d=torch.ones(1, dtype=torch.float64), counter=torch.tensor(3))
    save_file(tensors, path)
    found = files.read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype and found[name].equal(tensors[name]) for name in tensors)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:4], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        refused(files.read_tensors, path, "cannot be read")


@pytest.mark.parametrize("tensor, fault", [
    (torch.arange(3), "'odd' is torch.int64"), (torch.ones(2, dtype=torch.bool), "'odd' is torch.bool"),
    (torch.tensor([1, torch.nan]), "'odd' has values that are not finite"),
    (torch.tensor([torch.inf], dtype=torch.bfloat16), "'odd' has values that are not finite")])
def test_tensors_that_are_refused(tmp_path, tensor, fault):
    save_file(dict(a=torch.ones(2), odd=tensor), tmp_path / "a.safetensors")
    refused(files.read_tensors, tmp_path / "a.safetensors", fault)


def test_digest_is_sha256(tmp_path):
    raw = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "a").write_bytes(raw)
    assert files.digest(tmp_path / "a") == hashlib.sha256(raw).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# writing

def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "a" / "b"
    with files.whole_folder(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text("x")
        assert not out.exists()
    assert (out / "inner" / "x").read_text() == "x"
    for fault in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(fault), files.whole_folder(tmp_path / "c") as folder:
            (folder / "x").write_text("x")
            raise fault
    with pytest.raises(OSError), files.whole_folder(out) as folder:  # what is there stays
        (folder / "y").write_text("y")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "inner", "x"]


def test_a_file_holds_the_old_text_until_it_holds_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.replace_file(path, "old")
    files.replace_file(path, "é")
    assert path.read_text(encoding="utf-8") == "é" and os.listdir(tmp_path) == ["a.txt"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^.*a.txt: cannot be written .No space"):
            patch.setattr(os, step, full)
            files.replace_file(path, "new")
        assert path.read_text(encoding="utf-8") == "é"


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut could leave the new name with an empty file under it."""
    fsync, replace, calls = os.fsync, os.replace, []

    def record_fsync(descriptor):
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_replace(source, to):
        calls.append("replace")
        replace(source, to)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    out = tmp_path / "out"
    with files.whole_folder(out) as folder:
        (folder / "x").write_text("x")
    assert calls == [(out / "x").stat().st_ino, out.stat().st_ino, "replace", tmp_path.stat().st_ino]
    calls.clear()
    files.replace_file(tmp_path / "a.txt", "text")
    assert calls == [(tmp_path / "a.txt").stat().st_ino, "replace"]
