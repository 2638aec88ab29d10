"""runtime/files.py: a fault of a file is a ValueError of one line, and what is written appears whole or not at all."""
import errno
import io
import json
import lzma
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

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


def npy(array):
    """The bytes of an .npy file."""
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def tensors(**values):
    return save(dict(a=torch.ones(2)) | values)


def read_ab(path):
    return files.read_csv(path, ["a", "b"])


# ---------------------------------------------------------------------------------------------------------------------
# reading

@pytest.mark.parametrize("array", [np.arange(7), np.ones((3, 4), np.float32).T, np.zeros(0, np.uint16), np.float64(3),
                                   np.eye(2, dtype=">f4")], ids=str)
def test_arrays_come_back_and_cannot_be_written_to(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = files.read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


def test_no_array_is_unpickled(tmp_path):
    ran = tmp_path / "ran"
    np.save(tmp_path / "objects.npy", np.array([Runs(ran)], object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Runs(ran)))
    for name in ("objects.npy", "pickle.npy"):
        refused(files.read_array, tmp_path / name, "cannot be read")
    assert not ran.exists()
    np.load(tmp_path / "objects.npy", allow_pickle=True)  # this does run it
    assert ran.exists()


def test_text_json_csv_and_tensors_come_back(tmp_path):
    path, packed, table = tmp_path / "a.txt", tmp_path / "a.txt.xz", 'a,b,c\n1,"x, ""y""\nz",3\n\n4,漢,6\n'
    path.write_text(table, encoding="utf-8")
    packed.write_bytes(lzma.compress(table.encode()))
    for file in (path, packed):
        assert files.read_text(file) == table
        assert read_ab(file) == [(3, dict(a="1", b='x, "y"\nz', c="3")), (5, dict(a="4", b="漢", c="6"))]
        assert len(files.read_bytes(file, limit=len(table.encode()))) == len(table.encode())
        refused(lambda file: files.read_bytes(file, limit=10), file, "more than 10 bytes")
    for raw, kinds in ((b'{"a": [1, null]}', ()), (b"\xef\xbb\xbf{}", ()), (b"[1]", (list,)), (b"3", (int, list))):
        path.write_bytes(raw)
        assert files.read_json(path, *kinds) == json.loads(raw.decode("utf-8-sig"))
    weights = dict(a=torch.randn(2, 3), b=torch.ones(2, dtype=torch.bfloat16), c=torch.ones(1, dtype=torch.float16),
                   d=torch.ones(1, dtype=torch.float64), counter=torch.tensor(3))
    save_file(weights, path)
    found = files.read_tensors(path)
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == weights[name].dtype and found[name].equal(weights[name]) for name in weights)


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.read_json, files.read_array,
                                  files.read_tensors, read_ab])
def test_missing_files_and_folders_are_named(tmp_path, read):
    for path in (tmp_path / "none", tmp_path):
        refused(read, path, "cannot be read")


ARRAY, WEIGHTS = npy(np.arange(10)), tensors()


@pytest.mark.parametrize("read, raw, fault", [
    (files.read_array, npy(np.array([True])), "not an array of numbers"),
    (files.read_array, npy(np.array(["a"])), "not an array of numbers"),
    (files.read_array, npy(np.zeros(2, [("a", "u2")])), "not an array of numbers"),
    (files.read_array, ARRAY[:-1], "cannot be read"),
    (files.read_array, ARRAY + b"\0", "209 bytes, its header says 208"),
    (files.read_array, ARRAY[:50], "cannot be read"),
    (files.read_array, b"", "cannot be read"),
    (files.read_array, ARRAY.replace(b"(10,)", b"(-1,)"), "cannot be read"),
    (files.read_array, ARRAY.replace(b"(10,), }           ", b"(9999999999999,), }"), "cannot be read"),
    (files.read_text, b"caf\xe9", "UnicodeDecodeError"),
    (files.read_json, b"", "JSONDecodeError"),
    (files.read_json, b'{"a": NaN}', "NaN is not json"),
    (files.read_json, b'{"a": -Infinity}', "-Infinity is not json"),
    (files.read_json, b'"\xff"', "UnicodeDecodeError"),
    (files.read_json, b"[1]", "a list, not a dict"),
    (files.read_json, b"[" * 100_000, "RecursionError"),
    (files.read_json, b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    (read_ab, b"", "no one column a; it needs a, b"),
    (read_ab, b"a,b,b\n1,2,3\n", "no one column b"),
    (read_ab, b"a,b\n", "no items"),
    (read_ab, b"a,b\n1,2\n3\n", ":3: 1 fields, 2 columns"),
    (read_ab, b'a,b\n1,"2\n', ":2: no csv"),
    (read_ab, b"a,b\n1," + b"2" * 200_000, ":2: no csv"),
    (files.read_tensors, WEIGHTS[:-1], "cannot be read"),
    (files.read_tensors, WEIGHTS + b"\0", "cannot be read"),
    (files.read_tensors, b"\xff" * 100, "cannot be read"),
    (files.read_tensors, tensors(odd=torch.arange(3)), "'odd' is torch.int64"),
    (files.read_tensors, tensors(odd=torch.tensor([1, torch.nan])), "'odd' has values that are not finite"),
    (files.read_tensors, tensors(odd=torch.tensor([torch.inf], dtype=torch.bfloat16)), "'odd' has values")],
    ids=range(29))
def test_damaged_files_are_refused(tmp_path, read, raw, fault):
    (tmp_path / "a").write_bytes(raw)
    refused(read, tmp_path / "a", fault)


@pytest.mark.parametrize("raw", [lzma.compress(b"text")[:-1], b"no xz"])
def test_damaged_compressed_files_are_refused(tmp_path, raw):
    (tmp_path / "a.xz").write_bytes(raw)
    refused(files.read_text, tmp_path / "a.xz", "cannot be read")


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
    with pytest.raises(OSError), files.whole_folder(out) as folder:  # an older folder stays
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
