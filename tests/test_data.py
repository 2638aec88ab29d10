"""data.py: the sets on disk, and sampling against a slow and obvious implementation."""
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data

VOCAB = SimpleNamespace(vocab_size=100, n_units=20, switch=121)
TOKENIZER = SimpleNamespace(vocab_size=100, eos=0, hash="t")
UNITS = dict(n_units=20, rate=25, hash="u")


def paired_documents(rng, n):
    """Random documents as write_set wants them; some words own no unit."""
    return [([list(rng.integers(1, 100, rng.integers(1, 4))) for _ in range(words)],
             [list(rng.integers(0, 20, rng.integers(0, 7))) for _ in range(words)])
            for words in rng.integers(1, 60, n)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    data.write_set(out / "paired", "paired", paired_documents(rng, 40), TOKENIZER, UNITS, "made up")
    data.write_set(out / "text", "text", [rng.integers(1, 100, 50) for _ in range(30)], TOKENIZER)
    data.write_set(out / "speech", "speech", [rng.integers(0, 20, 70) for _ in range(30)], units=UNITS)
    return out


@given(st.lists(st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=4),
                                   st.lists(st.integers(0, 19), max_size=5)), max_size=8), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_paired_sets_round_trip(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("set") / "paired"
    data.write_set(folder, "paired", [([t for t, _ in d], [s for _, s in d]) for d in documents], TOKENIZER, UNITS)
    opened = data.open_set(folder, "t", "u", full=True)
    for i, document in enumerate(documents):
        text, speech, text_words, speech_words = opened.document(i)
        cut = [(text[a:b].tolist(), speech[c:d].tolist()) for a, b, c, d in
               zip(text_words, text_words[1:], speech_words, speech_words[1:], strict=False)]
        assert cut == [*document, ([0], [20])]  # EOS is the last word in both streams


def slow_interleave(shard, seed, stage, i, length, text_span, speech_span):
    """The same sequence, word by word."""
    n_words = len(shard.text_words) - 1
    word = int(data.uniform(seed, stage, i, 1) * n_words)
    speech, row, span = bool(data.uniform(seed, stage, i, 2) < 0.5), [], 0
    while len(row) < length:
        low, high = speech_span if speech else text_span
        row += [VOCAB.switch] * (span > 0)
        for _ in range(low + int(data.uniform(seed, stage, i, 3 + span) * (high - low + 1))):
            w = word % n_words
            if speech:
                row += (shard.speech[shard.speech_words[w]:shard.speech_words[w + 1]].astype(int) + 100).tolist()
            else:
                row += shard.text[shard.text_words[w]:shard.text_words[w + 1]].tolist()
            word += 1
        speech, span = not speech, span + 1
    return row[:length]


@given(seed=st.integers(0, 2**31), stage=st.integers(0, 5), first=st.integers(0, 2**40), length=st.integers(1, 700),
       text=st.tuples(st.integers(1, 12), st.integers(0, 20)), speech=st.tuples(st.integers(1, 12), st.integers(0, 10)))
@settings(max_examples=100, deadline=None)
def test_interleaving_equals_the_slow_one(folders, seed, stage, first, length, text, speech):
    shard = data.open_set(folders / "paired")  # lengths of 700 run around its end more than once
    spans = (text[0], sum(text)), (speech[0], sum(speech))
    index = first + np.arange(3)
    rows = data.interleave(shard, seed, stage, index, length, VOCAB, *spans)
    assert rows.tolist() == [slow_interleave(shard, seed, stage, i, length, *spans) for i in index]


def sources(folders, names=("text", "speech", "interleaved")):
    where = dict(text=["text"], speech=["speech"], interleaved=["paired"])
    return {k: data.open_source(k, [folders / f for f in where[k]], "t", "u") for k in names}


MIXTURE = dict(text=1, speech=1, interleaved=1)


@given(start=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 11), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_sequence_is_the_same_in_any_batch(folders, start, cuts):
    everything = {}
    for index in np.split(np.arange(start, start + 12), sorted(set(cuts))):
        rows, text_rows = data.sample(sources(folders), MIXTURE, 1, 2, index, 33, VOCAB)
        kinds = data.kinds_of(MIXTURE, index)
        assert text_rows == (kinds == "text").sum() and (rows[:text_rows] < 100).all()
        order = np.argsort(kinds != "text", kind="stable")
        everything |= dict(zip(index[order].tolist(), rows.tolist(), strict=True))
    for i, row in everything.items():
        alone, _ = data.sample(sources(folders), MIXTURE, 1, 2, [i], 33, VOCAB)
        assert alone[0].tolist() == row


def test_kinds_come_in_exact_parts():
    kinds = data.kinds_of(dict(text=1, speech=2, interleaved=3), np.arange(600)).tolist()
    assert [kinds.count(k) for k in ("text", "speech", "interleaved")] == [100, 200, 300]
    assert all({"text", "speech", "interleaved"} == set(data.kinds_of(MIXTURE, np.arange(i, i + 3))) for i in range(9))


def test_rows_hold_what_their_kind_says(folders):
    rows, text_rows = data.sample(sources(folders), MIXTURE, 0, 0, np.arange(300), 257, VOCAB)
    assert text_rows == 100 and (rows[:100] < 100).all()
    speech_only = ((rows[100:] >= 100) & (rows[100:] < 121)).all(1)
    assert speech_only.sum() == 100
    mixed = rows[100:][~speech_only]
    assert (mixed == 121).any(1).all() and (mixed < 122).all()
    batch = data.make_batch(rows, text_rows, VOCAB)
    targets = batch.tokens[:, 1:]
    assert batch.n_text == int((targets < 100).sum())
    assert batch.n_speech == int(((targets >= 100) & (targets != 121)).sum())


def test_windows_reach_both_ends_and_differ_by_seed_and_stage(folders):
    shard, index = data.open_set(folders / "text"), np.arange(200)
    length = len(shard.text) - 1  # two places to start
    rows = data.windows(shard, "text", 0, 0, index, length, VOCAB)
    first = (rows == shard.text[:-1]).all(1)
    assert 60 < first.sum() < 140 and (rows[~first] == shard.text[1:]).all()
    for seed, stage in ((1, 0), (0, 1)):
        assert (data.windows(shard, "text", seed, stage, index, length, VOCAB) != rows).any()
    with pytest.raises(data.DataError, match="1530 tokens, fewer than a sequence of 1531"):
        data.open_source("text", [folders / "text"], length=1531)


def test_weights_of_sets(tmp_path):
    for name, token, size in (("a", 5, 900), ("b", 6, 100)):
        data.write_set(tmp_path / name, "text", [np.full(size, token)], TOKENIZER)
    index = np.arange(4000)
    a, b = tmp_path / "a", tmp_path / "b"
    for sets, share in (([a, b], 901 / 1002), ({a: 0.2, b: 0.6}, 0.25)):
        rows, _ = data.sample({"text": data.open_source("text", sets)}, dict(text=1), 3, 0, index, 9, VOCAB)
        assert (rows == 5).any(1).mean() == pytest.approx(share, abs=0.03)


def test_sharded_set_is_drawn_by_size(tmp_path):
    for name, token, size in (("00", 5, 600), ("01", 6, 200)):
        data.write_set(tmp_path / "set" / name, "text", [np.full(size, token)], TOKENIZER)
    source = data.open_source("text", [tmp_path / "set"])
    assert len(source.shards) == 2 and source.cumulated == pytest.approx([601 / 802, 1])


# bad data: one clear line that names the file

def spoil(folder, name, change):
    array = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", change(array))


def put(position, value):
    def change(array):
        array = array.copy()
        array[position] = value
        return array
    return change


@pytest.mark.parametrize("name, change, message", [
    ("text", put(3, 100), "text.npy: has an id of 100 or more"),
    ("speech", put(3, 21), "speech.npy: has an id of 21 or more"),
    ("text", lambda a: a[:-1], "text.npy: has [0-9]+ elements, meta.json says"),
    ("text", lambda a: a.astype(np.int32), "text.npy: is int32"),
    ("text", put(-1, 7), "text.npy: does not end"),
    ("text_words", put(4, 0), "text_words.npy: has offsets that do not rise"),
    ("speech_words", put(4, 10**6), "speech_words.npy: has offsets that do not rise"),
    ("text_words", put(0, 1), "text_words.npy: runs from 1"),
    ("documents", put(1, 0), "documents.npy: has offsets that do not rise"),
    ("documents", put(1, 1), "_words.npy: has a document whose last word is not its EOS"),
    ("documents", lambda a: a.astype(np.float64), "documents.npy: is float64")])
def test_faults_are_named(folders, tmp_path, name, change, message):
    folder = tmp_path / "set"
    shutil.copytree(folders / "paired", folder)
    data.open_set(folder)
    spoil(folder, name, change)
    with pytest.raises(data.DataError, match=message):
        data.open_set(folder)


def test_what_is_no_set_is_refused(folders, tmp_path):
    with pytest.raises(data.DataError, match="no data set here"):
        data.open_set(tmp_path)
    with pytest.raises(data.DataError, match="made with text tokenizer 't', the model has 'x'"):
        data.open_set(folders / "paired", tokenizer="x")
    with pytest.raises(data.DataError, match="made with speech vocabulary 'u', the model has 'x'"):
        data.open_set(folders / "speech", units="x")
    with pytest.raises(data.DataError, match="a text set cannot give interleaved"):
        data.open_source("interleaved", [folders / "text"])
    with pytest.raises(data.DataError, match="exists already"):
        data.write_set(folders / "text", "text", [[1]], TOKENIZER)
    (tmp_path / "meta.json").write_text(json.dumps(dict(kind="video")))
    with pytest.raises(data.DataError, match="meta.json: not a data set's description"):
        data.open_set(tmp_path)
    shutil.copytree(folders / "text", tmp_path / "torn")
    (tmp_path / "torn" / "text.npy").write_bytes((tmp_path / "torn" / "text.npy").read_bytes()[:500])
    with pytest.raises(data.DataError, match="text.npy: cannot be read"):
        data.open_set(tmp_path / "torn")


def test_data_py_finds_what_opening_cannot(folders, tmp_path):
    shutil.copytree(folders / "paired", tmp_path / "set")
    array = np.load(tmp_path / "set" / "speech.npy")
    spoil(tmp_path / "set", "speech", put(3, (array[3] + 1) % 20))  # a unit like any other
    data.open_set(tmp_path / "set")
    with pytest.raises(data.DataError, match="set: a file is not as it was written"):
        data.open_set(tmp_path / "set", full=True)
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    del meta["sha256"]  # as sets had it once
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta))
    data.open_set(tmp_path / "set", full=True)


def test_data_py_checks_every_shard(folders, tmp_path):
    for i in range(2):
        shutil.copytree(folders / "paired", tmp_path / f"shards/shard-{i}-of-2-00000")
    command = [sys.executable, data.__file__, tmp_path / "shards"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('"sha256"') == 2
    (tmp_path / "shards/shard-1-of-2-00000/text.npy").write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "shard-1-of-2-00000/text.npy: cannot be read" in done.stderr


def test_offsets_whose_differences_overflow(folders, tmp_path):
    shutil.copytree(folders / "paired", tmp_path / "set")
    spoil(tmp_path / "set", "text_words", lambda a: np.concatenate([a[:3], [2**63 - 1, -2], a[5:]]))
    assert (np.diff(np.load(tmp_path / "set" / "text_words.npy")) > 0).all()
    with pytest.raises(data.DataError, match="text_words.npy: has offsets that do not rise"):
        data.open_set(tmp_path / "set")


def test_nothing_pickled_is_read(folders, tmp_path):
    shutil.copytree(folders / "text", tmp_path / "set")
    np.save(tmp_path / "set" / "documents.npy", np.array([0, {}], object), allow_pickle=True)
    with pytest.raises(data.DataError, match="documents.npy: cannot be read"):
        data.open_set(tmp_path / "set")


def test_writing_is_atomic(tmp_path):
    def documents():
        yield [1, 2]
        raise RuntimeError("the corpus ends here")
    with pytest.raises(RuntimeError):
        data.write_set(tmp_path / "set", "text", documents(), TOKENIZER)
    assert not (tmp_path / "set").exists()


def test_prefetch_hands_over_errors_and_order():
    assert list(data.prefetch(lambda i: i * i, range(50))) == [i * i for i in range(50)]

    def fail(i):
        if i == 3:
            raise data.DataError("disk gone")
        return i
    with pytest.raises(data.DataError, match="disk gone"):
        list(data.prefetch(fail, range(50)))
