"""studies/small/books.py and studies/small/corpus.py: other people's archives, phone purity, the cloze set, all of it in small."""
import json
import struct
import zlib

import numpy as np
import pytest

from data import open_source
from studies.small import books
from studies.small import corpus as small


def r_object(lines, version=3, kind=16):
    """What R's serialize() writes of a character vector."""
    head = b"X\n" + struct.pack(">3i", version, 0x40300, 0x30500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    body = struct.pack(">2i", kind, len(lines))
    for line in lines:
        text = (line or "").encode()
        body += struct.pack(">2i", 0x40009, -1 if line is None else len(text)) + text
    return head + body


def r_archive(*objects):
    """An .rdb of vectors of strings, or of what is bytes already."""
    raw = [o if isinstance(o, bytes) else r_object(o) for o in objects]
    return b"".join(struct.pack(">I", len(o)) + zlib.compress(o) for o in raw)


def sword_module(*texts):
    blocks = [zlib.compress(text.encode()) for text in texts]
    starts = np.cumsum([0, *map(len, blocks)])
    return {"ot.bzs": np.array([(a, len(b), 0) for a, b in zip(starts, blocks)], "<u4").tobytes(),
            "ot.bzz": b"".join(blocks)}


@pytest.mark.parametrize("version", [2, 3])
def test_books_in_r_packages(tmp_path, version):
    novel = ["EMMA", "", "By Jane Austen — a novel", None, "word " * 2500]
    objects = [r_object(novel, version), r_object(["short"], version), r_object(["number"] * 3000, version, kind=13)]
    (tmp_path / "Rdata.rdb").write_bytes(r_archive(*objects))
    assert books.make(tmp_path, tmp_path / "out") == {"emma-by-jane-austen": 2507}
    assert (tmp_path / "out/emma-by-jane-austen.txt").read_text().splitlines()[:3] == novel[:3]


def test_books_in_sword_modules(tmp_path):
    verse = ('<title>Genesis</title><verse osisID="Gen.1.1"/><w lemma="strong:H7225">In the beginning</w>'
             '<note type="x-footnote">or, at first</note>, God<p/>created. ')
    for name, raw in sword_module("<div/>", verse * 500).items():
        (tmp_path / name).write_bytes(raw)
    assert list(books.make(tmp_path, tmp_path / "out")) == ["in-the-beginning-god"]
    text = (tmp_path / "out/in-the-beginning-god.txt").read_text()
    assert text.split() == "In the beginning , God created.".split() * 500


def test_no_books_and_torn_books(tmp_path):
    with pytest.raises(SystemExit, match="no book of 2000 words"):
        books.make(tmp_path, tmp_path / "out")
    (tmp_path / "Rdata.rdb").write_bytes(r_archive(["word " * 3000])[:-9] + b"123456789")
    with pytest.raises(SystemExit, match=r"Rdata\.rdb: not what its name says"):
        books.make(tmp_path, tmp_path / "out")
    (tmp_path / "Rdata.rdb").unlink()
    for name, raw in sword_module(" ".join(map(str, range(9000)))).items():
        (tmp_path / name).write_bytes(raw[:-5000] if name.endswith("z") else raw)
    with pytest.raises(SystemExit, match=r"ot\.bzz: not what its name says \(it breaks off"):
        books.make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_purity_by_hand():
    got = small.purity([0, 0, 0, 1, 1, 2], ["a", "a", "b", "b", "b", "b"])
    assert got["phone_purity"] == pytest.approx(5 / 6) and got["cluster_purity"] == pytest.approx(4 / 6)
    joint = {(0, "a"): 2 / 6, (0, "b"): 1 / 6, (1, "b"): 2 / 6, (2, "b"): 1 / 6}
    p_unit, p_phone = {0: 3 / 6, 1: 2 / 6, 2: 1 / 6}, {"a": 2 / 6, "b": 4 / 6}
    information = sum(p * np.log(p / p_unit[u] / p_phone[x]) for (u, x), p in joint.items())
    assert got["pnmi"] == pytest.approx(information / -sum(p * np.log(p) for p in p_phone.values()))


def test_cut():
    long, end = "one two three four five six seven eight nine ten " * 2, "and so it ended at last."
    assert small.cut(f"{long}done. {end}") == 21
    assert small.cut(f'{long}done!" {end}') == 21
    assert small.cut(f"{long}done. {long}done. {end}") == 42  # the last sentence
    assert small.cut(f"{long}{end}") is None                  # only one sentence
    assert small.cut(f"too short. {end}") is None
    assert small.cut(f"{long}done. The end.") is None
    assert small.cut(f"{long}done. He and Mrs. Dashwood came at last.") == 21
    assert small.cut(f"{long}done.”  {end}") == 21


def test_false_endings_are_of_another_book_in_the_same_voice():
    passages = [(book, speaker, i / 2, ([(book, speaker, i)] * 6, [(book, speaker, i)] * 6), 4)
                for i in range(40) for book in "xyz" for speaker in (1, 5)]
    cloze = small.cut_cloze(passages, 0)
    assert len(cloze) == 3 * len(passages)
    for opening, true, false in zip(cloze[::3], cloze[1::3], cloze[2::3]):
        for side in (0, 1):
            assert [len(x[side]) for x in (opening, true, false)] == [4, 2, 2]
            assert opening[side][0] == true[side][0]
            (book, speaker, level), (its_book, its_speaker, its_level) = true[side][0], false[side][0]
            assert its_book != book and its_speaker == speaker and abs(its_level - level) < 20  # 20 in half a dB each
    assert cloze != small.cut_cloze(passages, 1)


SETS = ("train", "test", "cloze")


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_folder):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("small")
    words = "the old man saw a ship on the wide sea and told his friend about it one fine day".split()
    rng = np.random.default_rng(0)
    (folder / "books").mkdir()
    for name in ("moby", "emma", "sense-and-sensibility", "persuasion", "alice"):
        sentences = [" ".join(rng.permutation(words)[:12]).capitalize() + "." for _ in range(120)]
        (folder / f"books/{name}.txt").write_text(" ".join(sentences))
    arguments = [f"--source={folder}/books", f"--out={folder}/out", f"--tokenizer={demo_folder}/tokenizer.json",
                 "--layers=[]", "--n_units=20", "--fit=8", "--judge=4", "--passages=6", "--workers=1"]
    small.main(arguments)
    return folder / "out", arguments


def test_the_whole_corpus(made):
    out, arguments = made
    about = json.loads((out / "units.json").read_text())
    assert about["chosen"] == "mel" and 0.2 < about["of"]["mel"]["phone_purity"] < 1
    train, test, cloze = (open_source("interleaved", [out / x]).shards[0] for x in SETS)
    assert [x.meta["documents"] for x in (train, test)] == [12, 12] and cloze.meta["documents"] == 36
    for i in range(12):  # opening and true ending are the passage
        whole, parts = test.document(i), [cloze.document(3 * i + j) for j in (0, 1)]
        for side in (0, 1):
            assert np.array_equal(whole[side][:-1], np.concatenate([p[side][:-1] for p in parts]))
    before = (out / "train/report.json").stat().st_mtime_ns, (out / "cloze/meta.json").read_text()
    small.main(arguments)  # all is there
    assert (out / "cloze/meta.json").read_text() == before[1] and len(list((out / "train").glob("shard-*"))) == 1
    assert json.loads((out / "small.json").read_text())["cloze"] == dict(items=12)
    with pytest.raises(SystemExit, match="was made with --n_units=20, not 30; give that"):
        small.main([x.replace("--n_units=20", "--n_units=30") for x in arguments])


def test_missing_books_are_named(tmp_path):
    (tmp_path / "moby.txt").write_text("Call me Ishmael.")
    with pytest.raises(SystemExit, match="no book for val/"):
        small.main([f"--source={tmp_path}", f"--out={tmp_path}/out"])


@pytest.mark.parametrize("option, message", [
    ("--tokenizer=nowhere.json", "nowhere.json"), ("--shard=1/2", "units: not there yet; shard 0 makes it"),
    ("--whisper=nowhere", "nowhere/config.json"), ("--layers=[]", "3 passages in the training books are too few")])
def test_what_cannot_be_is_said_before_anything_is_spoken(tmp_path, demo_folder, monkeypatch, option, message):
    for name in ("moby", "emma", "emma2", "sense", "persuasion"):
        (tmp_path / f"{name}.txt").write_text("Call me Ishmael.")
    monkeypatch.setattr(small, "record", None)
    fit = ["--fit=2", "--judge=1"] if "whisper" in option else []
    with pytest.raises(SystemExit, match=message):
        small.main([f"--source={tmp_path}", f"--out={tmp_path}/out", f"--tokenizer={demo_folder}/tokenizer.json", *fit,
                    option])
