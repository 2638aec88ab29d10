"""studies/small: books out of packages, phone purity, the cloze set, and a very small corpus."""
import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from data import open_source
from studies.small import books
from studies.small import corpus as small


def r_object(lines, version, kind=16):
    """What R's serialize() writes for a character vector."""
    head = b"X\n" + struct.pack(">3i", version, 0x40300, 0x30500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    body = struct.pack(">2i", kind, len(lines))
    for line in lines:
        text = (line or "").encode()
        body += struct.pack(">2i", 0x40009, -1 if line is None else len(text)) + text
    return head + body


@pytest.mark.parametrize("version", [2, 3])
def test_books_in_r_packages(tmp_path, version):
    novel = ["EMMA", "", "By Jane Austen — a novel", None, "word " * 2500]
    objects = [r_object(novel, version), r_object(["short"], version), r_object(["number"] * 3000, version, kind=13)]
    archive = b"".join(struct.pack(">I", len(r)) + zlib.compress(r) for r in objects)
    (tmp_path / "Rdata.rdb").write_bytes(archive)
    assert books.make(tmp_path, tmp_path / "out") == {"emma-by-jane-austen": 2507}  # the other objects are no books
    assert (tmp_path / "out/emma-by-jane-austen.txt").read_text().splitlines()[:3] == novel[:3]
    (tmp_path / "Rdata.rdb").write_bytes(archive[:-9] + b"123456789")
    with pytest.raises(SystemExit, match="Rdata.rdb: cannot be read; unpack the package again"):
        books.make(tmp_path, tmp_path / "again")


def test_books_in_sword_modules(tmp_path):
    verse = ('<title>Genesis</title><verse osisID="Gen.1.1"/><w lemma="strong:H7225">In the beginning</w>'
             '<note type="x-footnote">or, at first</note>, God<p/>created. ')
    blocks = [zlib.compress(text.encode()) for text in ("<div/>", verse * 500)]
    (tmp_path / "ot.bzs").write_bytes(np.array([(0, len(blocks[0]), 0), (len(blocks[0]), len(blocks[1]), 0)], "<u4"))
    (tmp_path / "ot.bzz").write_bytes(b"".join(blocks))
    books.make(tmp_path, tmp_path / "out")
    words = (tmp_path / "out/in-the-beginning-god.txt").read_text().split()
    assert words == "In the beginning , God created.".split() * 500


def test_purity_by_hand():
    got = small.purity([0, 0, 0, 1, 1, 2], ["a", "a", "b", "b", "b", "b"])
    assert got["phone_purity"] == pytest.approx(5 / 6) and got["cluster_purity"] == pytest.approx(4 / 6)
    information = (2 * np.log(2) + np.log(1 / 2) + 2 * np.log(3 / 2) + np.log(3 / 2)) / 6
    assert got["pnmi"] == pytest.approx(information / (np.log(3) / 3 + 2 / 3 * np.log(3 / 2)))


LONG, END = "one two three four five six seven eight nine ten " * 2, "and so it ended at last."


@pytest.mark.parametrize("passage, word", [
    (f"{LONG}done.”  {END}", 21), (f"{LONG}. {LONG}. {END}", 42), (f"{LONG}. Then Mrs. {END}", 21),
    (f"{LONG}{END}", None), (f"short. {END}", None), (f"{LONG}. The end.", None)])
def test_the_last_sentence_is_cut_off(passage, word):
    assert small.cut(passage) == word


def test_false_endings_are_of_another_book_in_the_same_voice():
    passages = []
    for i in range(40):
        for book, speaker in itertools.product("xyz", (1, 5)):
            passages.append((book, speaker, i / 2, ([(book, speaker, i)] * 6, [(book, speaker, i)] * 6), 4))
    cloze = small.cut_cloze(passages, 0)
    for opening, true, false in zip(cloze[::3], cloze[1::3], cloze[2::3]):
        for side in (0, 1):
            assert [len(x[side]) for x in (opening, true, false)] == [4, 2, 2]
            assert opening[side][0] == true[side][0]
            (book, speaker, i), (its_book, its_speaker, j) = true[side][0], false[side][0]
            assert its_book != book and its_speaker == speaker and abs(i - j) < 20  # out of the 20 most alike


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, demo_folder):
    folder = tmp_path_factory.mktemp("small")
    words = "the old man saw a ship on the wide sea and told his friend about it one fine day".split()
    rng = np.random.default_rng(0)
    for name in ("moby", "emma", "sense-and-sensibility", "persuasion", "alice"):  # one is for val/, two for test/
        sentences = [" ".join(rng.permutation(words)[:12]).capitalize() + "." for _ in range(120)]
        (folder / f"{name}.txt").write_text(" ".join(sentences))
    return [f"--source={folder}", f"--out={folder}/out", f"--tokenizer={demo_folder}/tokenizer.json",
            "--layers=[]", "--n_units=20", "--fit=8", "--judge=4", "--passages=6", "--workers=1"]


def test_the_whole_corpus(arguments):
    """All sets are made. Opening and true ending of a cloze item are a passage of test/. A second call keeps them."""
    small.main(arguments)
    out = Path(arguments[1].partition("=")[2])
    about = json.loads((out / "units.json").read_text())
    assert about["chosen"] == "mel" and 0.2 < about["of"]["mel"]["phone_purity"] < 1
    train, test, cloze = (open_source("interleaved", [out / name]).shards[0] for name in ("train", "test", "cloze"))
    assert [train.meta["documents"], test.meta["documents"], cloze.meta["documents"]] == [12, 12, 36]
    for i in range(12):
        whole, opening, ending = test.document(i), cloze.document(3 * i), cloze.document(3 * i + 1)
        for side in (0, 1):
            assert np.array_equal(whole[side][:-1], np.concatenate([opening[side][:-1], ending[side][:-1]]))
    before = (out / "cloze/meta.json").read_text()
    small.main(arguments)
    assert (out / "cloze/meta.json").read_text() == before and len(list((out / "train").glob("shard-*"))) == 1
    with pytest.raises(SystemExit, match="was made with --n_units=20, not 30; give another"):
        small.main([*arguments, "--n_units=30"])


@pytest.mark.parametrize("option, message", [
    ("--source=nowhere", "no book for train/"), ("--tokenizer=nowhere.json", "nowhere.json"),
    ("--shard=1/2", "units: does not exist yet; shard 0 makes it"), ("--fit=99", "too few for fit=99"),
    ("--whisper=nowhere --layers=[2]", "nowhere/config.json")])
def test_bad_settings_end_before_anything_is_spoken(tmp_path, arguments, monkeypatch, option, message):
    monkeypatch.setattr(small, "record", None)
    with pytest.raises(SystemExit, match=message):
        small.main([*arguments, f"--out={tmp_path}/out", *option.split()])
