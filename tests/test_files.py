"""runtime/files.py: a fault of a file is a ValueError of one line, and what is written appears whole or not at all."""
import errno
import io
import lzma
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from runtime import files


class Runs:
    """Creates the folder "ran" when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def read_ab(path):
    return files.read_csv(path, ["a", "b"])


def test_what_was_written_is_read(tmp_path):
    path, packed, table = tmp_path / "a.txt", tmp_path / "a.txt.xz", 'a,b,c\n1,"x, ""y""\nz",3\n\n4,漢,6\n'
    path.write_text(table, encoding="utf-8")
    packed.write_bytes(lzma.compress(table.encode()))
    for file in (path, packed):
        assert files.read_text(file) == table
        assert read_ab(file) == [(3, dict(a="1", b='x, "y"\nz', c="3")), (5, dict(a="4", b="漢", c="6"))]
        with pytest.raises(ValueError, match="more than 10 characters"):
            files.read_text(file, limit=10)
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(path, list) == [1]
    weights = dict(a=torch.randn(2, 3), b=torch.ones(2, dtype=torch.bfloat16), counter=torch.tensor(3))
    save_file(weights, path)
    found = files.read_tensors(path)
    assert found.keys() == weights.keys() and all(found[name].equal(weights[name]) for name in weights)
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32).T)
    found = files.read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.shape == (4, 3) and found.all()


def test_no_array_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for raw in (pickle.dumps(Runs()), npy(np.array([Runs()], object))):
        (tmp_path / "a.npy").write_bytes(raw)
        with pytest.raises(ValueError, match="cannot be read"):
            files.read_array("a.npy")
    assert not os.path.exists("ran")
    np.load("a.npy", allow_pickle=True)  # this does run it
    assert os.path.exists("ran")


@pytest.mark.parametrize("read, raw, fault", [
    (files.read_text, None, "cannot be read"),
    (files.read_array, npy(np.arange(10)) + b"\0", "209 bytes, its header says 208"),
    (files.read_text, b"\xfd7zXZ no", "a.xz: cannot be read"),
    (files.read_json, b'{"a": NaN}', "NaN is not json"),
    (files.read_json, b"[1]", "a list, not a dict"),
    (files.read_json, b"[" * 100_000, "RecursionError"),
    (read_ab, b"a,b\n1,2\n3\n", ":3: 1 fields, 2 columns"),
    (read_ab, b'a,b\n1,"2\n', ":2: no csv"),
    (files.read_tensors, save(dict(a=torch.ones(2)))[:-1], "cannot be read"),
    (files.read_tensors, save(dict(odd=torch.arange(3))), "'odd' is torch.int64"),
    (files.read_tensors, save(dict(odd=torch.tensor([1, torch.nan]))), "'odd' has values that are not finite")],
    ids=range(11))
def test_damaged_files_are_refused(tmp_path, read, raw, fault):
    path = tmp_path / ("a.xz" if "xz" in fault else "a")
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ValueError) as error:
        read(path)
    assert fault in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out"
    with files.whole_folder(out) as folder:
        (folder / "x").write_text("x")
        assert not out.exists()
    for name, fault in (("new", KeyboardInterrupt), ("out", OSError)):  # an older folder stays
        with pytest.raises(fault), files.whole_folder(tmp_path / name) as folder:
            (folder / "y").write_text("y")
            if fault is KeyboardInterrupt:
                raise fault
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "x"]


def test_a_file_holds_the_old_text_until_it_holds_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.replace_file(path, "é")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^.*a.txt: cannot be written .No space"):
            patch.setattr(os, step, full)
            files.replace_file(path, "new")
        assert path.read_text(encoding="utf-8") == "é"


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut could leave the new name with an empty file under it."""
    replace, calls = os.replace, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda source, to: calls.append("replace") or replace(source, to))
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    files.replace_file(tmp_path / "a.txt", "text")
    names = {path.stat().st_ino: path.name for path in [tmp_path, *tmp_path.rglob("*")]}
    assert [names.get(call, call) for call in calls] == ["x", "out", "replace", tmp_path.name, "a.txt", "replace"]
