"""data.py: the sets on disk, and sampling against a slow and obvious implementation."""
import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from runtime import datasets
from runtime.distributed import ALONE, World
from runtime.files import DataError

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
    datasets.write_set(out / "paired", "paired", paired_documents(rng, 40), TOKENIZER, UNITS, "made up")
    datasets.write_set(out / "text", "text", [rng.integers(1, 100, 50) for _ in range(30)], TOKENIZER)
    datasets.write_set(out / "speech", "speech", [rng.integers(0, 20, 70) for _ in range(30)], units=UNITS)
    return out


@given(st.lists(st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=4),
                                   st.lists(st.integers(0, 19), max_size=5)), max_size=8), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_paired_sets_round_trip(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("set") / "paired"
    datasets.write_set(folder, "paired", [([t for t, _ in d], [s for _, s in d]) for d in documents], TOKENIZER, UNITS)
    opened = datasets.open_set(folder, "t", "u", full=True)
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
    shard = datasets.open_set(folders / "paired")  # lengths of 700 run around its end more than once
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
        rows = data.sample(sources(folders), MIXTURE, 1, 2, index, 33, VOCAB)
        assert (rows[data.kinds_of(MIXTURE, index) == "text"] < 100).all()
        everything |= dict(zip(index.tolist(), rows.tolist(), strict=True))
    for i, row in everything.items():
        alone = data.sample(sources(folders), MIXTURE, 1, 2, [i], 33, VOCAB)
        assert alone[0].tolist() == row


def test_kinds_come_in_exact_parts():
    kinds = data.kinds_of(dict(text=1, speech=2, interleaved=3), np.arange(600)).tolist()
    assert [kinds.count(k) for k in ("text", "speech", "interleaved")] == [100, 200, 300]
    assert all({"text", "speech", "interleaved"} == set(data.kinds_of(MIXTURE, np.arange(i, i + 3))) for i in range(9))


def test_rows_hold_what_their_kind_says(folders):
    rows = data.sample(sources(folders), MIXTURE, 0, 0, np.arange(300), 257, VOCAB)
    kinds = data.kinds_of(MIXTURE, np.arange(300))
    assert (rows[kinds == "text"] < 100).all()
    assert ((rows[kinds == "speech"] >= 100) & (rows[kinds == "speech"] < 121)).all()
    mixed = rows[kinds == "interleaved"]
    assert len(mixed) == 100 and (mixed == 121).any(1).all() and (mixed < 122).all()


def test_windows_reach_both_ends_and_differ_by_seed_and_stage(folders):
    shard, index = datasets.open_set(folders / "text"), np.arange(200)
    length = len(shard.text) - 1  # two places to start
    rows = data.windows(shard, "text", 0, 0, index, length, VOCAB)
    first = (rows == shard.text[:-1]).all(1)
    assert 60 < first.sum() < 140 and (rows[~first] == shard.text[1:]).all()
    for seed, stage in ((1, 0), (0, 1)):
        assert (data.windows(shard, "text", seed, stage, index, length, VOCAB) != rows).any()
    with pytest.raises(DataError, match="1530 tokens, fewer than a sequence of 1531"):
        data.open_source("text", [folders / "text"], length=1531)


def test_weights_of_sets(tmp_path):
    for name, token, size in (("a", 5, 900), ("b", 6, 100)):
        datasets.write_set(tmp_path / name, "text", [np.full(size, token)], TOKENIZER)
    index = np.arange(4000)
    a, b = tmp_path / "a", tmp_path / "b"
    for sets, share in (([a, b], 901 / 1002), ({a: 0.2, b: 0.6}, 0.25)):
        rows = data.sample({"text": data.open_source("text", sets)}, dict(text=1), 3, 0, index, 9, VOCAB)
        assert (rows == 5).any(1).mean() == pytest.approx(share, abs=0.03)


def test_sharded_set_is_drawn_by_size(tmp_path):
    for name, token, size in (("00", 5, 600), ("01", 6, 200)):
        datasets.write_set(tmp_path / "set" / name, "text", [np.full(size, token)], TOKENIZER)
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
    ("text", put(3, 100), "text.npy: holds a number outside 0..99"),
    ("speech", put(3, 21), "speech.npy: holds a number outside 0..20"),
    ("text", lambda a: a[:-1], "text.npy: is uint16 .*, not uint16"),
    ("text", lambda a: a.astype(np.int32), "text.npy: is int32 .*, not uint16"),
    ("text", lambda a: a[None], "text.npy: is uint16 .*, not uint16"),
    ("text", put(-1, 7), "text_words.npy: has a document that does not end with its EOS"),
    ("text_words", put(4, 0), "text_words.npy: has offsets that do not rise"),
    ("speech_words", put(4, 10**6), "speech_words.npy: holds a number outside 0.."),
    ("text_words", put(0, 1), "text_words.npy: goes from 1 to"),
    ("documents", put(1, 0), "documents.npy: has offsets that do not rise"),
    ("documents", put(1, 1), "_words.npy: has a document that does not end with its EOS"),
    ("documents", lambda a: a.astype(np.float64), "documents.npy: is float64 .*, not int64")])
def test_faults_are_named(folders, tmp_path, name, change, message):
    folder = tmp_path / "set"
    shutil.copytree(folders / "paired", folder)
    datasets.open_set(folder)
    spoil(folder, name, change)
    with pytest.raises(DataError, match=message):
        datasets.open_set(folder)


def test_what_is_no_set_is_refused(folders, tmp_path):
    with pytest.raises(DataError, match="no data set here"):
        datasets.open_set(tmp_path)
    with pytest.raises(DataError, match="made with text tokenizer 't', the model has 'x'"):
        datasets.open_set(folders / "paired", tokenizer="x")
    with pytest.raises(DataError, match="made with speech vocabulary 'u', the model has 'x'"):
        datasets.open_set(folders / "speech", units="x")
    with pytest.raises(DataError, match="a text set cannot give interleaved"):
        data.open_source("interleaved", [folders / "text"])
    with pytest.raises(DataError, match="exists already"):
        datasets.write_set(folders / "text", "text", [[1]], TOKENIZER)
    (tmp_path / "meta.json").write_text(json.dumps(dict(kind="video")))
    with pytest.raises(DataError, match="meta.json: not a data set's description"):
        datasets.open_set(tmp_path)
    shutil.copytree(folders / "text", tmp_path / "torn")
    (tmp_path / "torn" / "text.npy").write_bytes((tmp_path / "torn" / "text.npy").read_bytes()[:500])
    with pytest.raises(DataError, match="text.npy: cannot be read"):
        datasets.open_set(tmp_path / "torn")


def test_data_py_finds_what_opening_cannot(folders, tmp_path):
    shutil.copytree(folders / "paired", tmp_path / "set")
    array = np.load(tmp_path / "set" / "speech.npy")
    spoil(tmp_path / "set", "speech", put(3, (array[3] + 1) % 20))  # a unit like any other
    datasets.open_set(tmp_path / "set")
    with pytest.raises(DataError, match="set: a file is not as it was written"):
        datasets.open_set(tmp_path / "set", full=True)
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    del meta["sha256"]  # as sets had it once
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta))
    datasets.open_set(tmp_path / "set", full=True)


def test_data_py_checks_every_shard(folders, tmp_path):
    for i in range(2):
        shutil.copytree(folders / "paired", tmp_path / f"shards/shard-{i}-of-2-00000")
    command = [sys.executable, data.__file__, tmp_path / "shards"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('"sha256"') == 2
    (tmp_path / "shards/shard-1-of-2-00000/text.npy").write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "shard-1-of-2-00000/text.npy: cannot be read" in done.stderr
    for arguments, code in (([], 1), (["--help"], 0)):
        done = subprocess.run([*command[:2], *arguments], capture_output=True, text=True)
        assert done.returncode == code and "python data.py FOLDER" in done.stdout + done.stderr


def test_offsets_whose_differences_overflow(folders, tmp_path):
    shutil.copytree(folders / "paired", tmp_path / "set")
    spoil(tmp_path / "set", "text_words", lambda a: np.concatenate([a[:3], [2**63 - 1, -2], a[5:]]))
    assert (np.diff(np.load(tmp_path / "set" / "text_words.npy")) > 0).all()
    with pytest.raises(DataError, match="text_words.npy: holds a number outside 0.."):
        datasets.open_set(tmp_path / "set")


def test_long_arrays_are_checked_in_samples(tmp_path, monkeypatch):
    """A fault between the samples is found only by the full check. Faults at both ends are always found."""
    monkeypatch.setattr(datasets, "FULL_CHECK", 1 << 17)
    array = np.arange(3 << 22)
    seen = np.zeros(len(array), bool)
    for piece in datasets.pieces(array, full=False):
        seen[piece] = True
    assert seen[0] and seen[-1] and 0.3 < seen.mean() < 0.4
    pairs = np.concatenate([np.stack([piece[:-1], piece[1:]], 1) for piece in datasets.pieces(array, full=True)])
    assert np.array_equal(pairs, np.stack([array[:-1], array[1:]], 1))  # each difference of neighbours is seen once

    datasets.write_set(tmp_path / "set", "text", np.full((1 << 16, 99), 5), TOKENIZER)
    whole = np.load(tmp_path / "set" / "text.npy")
    for position, value, message, sampled in ((70_000, 100, "holds a number outside", False),
                                              (99 + 100 * 40, 5, "does not end with its EOS", False),
                                              (0, 100, "holds a number outside", True),
                                              (len(whole) - 1, 5, "does not end with its EOS", True)):
        np.save(tmp_path / "set" / "text.npy", put(position, value)(whole))
        if not sampled:
            datasets.open_set(tmp_path / "set")
        with pytest.raises(DataError, match=message):
            datasets.open_set(tmp_path / "set", full=not sampled)


def test_nothing_pickled_is_read(folders, tmp_path):
    shutil.copytree(folders / "text", tmp_path / "set")
    np.save(tmp_path / "set" / "documents.npy", np.array([0, {}], object), allow_pickle=True)
    with pytest.raises(DataError, match="documents.npy: cannot be read"):
        datasets.open_set(tmp_path / "set")


def test_writing_is_atomic(tmp_path):
    def documents():
        yield [1, 2]
        raise RuntimeError("the corpus ends here")
    with pytest.raises(RuntimeError):
        datasets.write_set(tmp_path / "set", "text", documents(), TOKENIZER)
    assert not (tmp_path / "set").exists()


# batches

RUN = SimpleNamespace(seed=3, batch_tokens=64 * 12, sequence_length=64, micro_batch=5, text_span=(10, 30),
                      speech_span=(5, 15))


def test_global_batches_do_not_depend_on_the_processes(folders):
    drawn, stage = sources(folders), dict(mixture=MIXTURE, train="all")
    for step in (0, 7):
        numbers = range(12 * step, 12 * step + 12)
        expected = {i: data.sample(drawn, MIXTURE, 3, 2, [i], 65, VOCAB)[0] for i in numbers}
        for size in (1, 2, 3, 4, 6, 12):
            found = {}
            for rank in range(size):
                world = World(rank, 0, size)
                for batch in data.micro_batches(step, drawn, stage, 2, RUN, VOCAB, world):
                    for i, ids, targets in zip(batch.index, batch.ids, batch.targets, strict=True):
                        assert i not in found and ids[1:].equal(targets[:-1])
                        found[i] = [*ids.tolist(), targets[-1].item()]
            assert found == {i: row.tolist() for i, row in expected.items()}


@pytest.mark.parametrize("train", ["all", "new", "text"])
@pytest.mark.parametrize("mixture, sizes", [
    (dict(text=2, speech=1), [4, 4, 4]), (dict(text=1), [4, 4, 4]), (dict(speech=1), [4, 4, 4]),
    (MIXTURE, [4, 4, 4]), (dict(text=1, interleaved=1), [3, 3, 3, 3]), (dict(text=3, interleaved=1), [5, 4, 3])])
def test_micro_batches_are_cut_by_kind(folders, mixture, sizes, train):
    stage = dict(mixture=mixture, train=train)
    batches = data.micro_batches(5, sources(folders), stage, 2, RUN, VOCAB, ALONE)
    assert [len(batch.ids) for batch in batches] == sizes
    text_alone = [set(data.kinds_of(mixture, batch.index)) == {"text"} for batch in batches]
    assert text_alone == sorted(text_alone, reverse=True)
    for batch, alone in zip(batches, text_alone, strict=True):
        assert alone or "text" not in data.kinds_of(mixture, batch.index)
        skips = alone and (train == "text" or train == "all" and batch is not batches[-1])
        assert (batch.layout.speech is None) == skips


def test_the_last_micro_batch_has_speech_even_if_it_is_empty(folders):
    for train in ("all", "new"):
        stage = dict(mixture=dict(text=1), train=train)
        last = data.micro_batches(0, sources(folders), stage, 0, RUN, VOCAB, ALONE)[-1]
        assert last.layout.speech.tolist() == [] and (last.ids < 100).all()


def test_layouts_equal_the_slow_ones(folders):
    for batch in data.micro_batches(1, sources(folders), dict(mixture=MIXTURE, train="all"), 0, RUN, VOCAB, ALONE):
        text, speech, runs = [], [], []
        for row, (ids, targets) in enumerate(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True)):
            before = None
            for column, (i, target) in enumerate(zip(ids, targets, strict=True)):
                if target != 121:
                    (text if target < 100 else speech).append(64 * row + column)
                if before != (100 <= i < 121):
                    runs.append(64 * row + column)
                before = 100 <= i < 121
        assert batch.layout.text.tolist() == text
        assert speech == ([] if batch.layout.speech is None else batch.layout.speech.tolist())
        assert batch.layout.runs[:len(runs)].tolist() == runs
        assert set(batch.layout.runs[len(runs):].tolist()) == {batch.ids.numel()}


def test_describe_names_kind_and_folder(tmp_path):
    for name, token in (("a", 5), ("b", 6)):
        datasets.write_set(tmp_path / name, "text", [np.full(500, token)], TOKENIZER)
    datasets.write_set(tmp_path / "speech", "speech", [np.full(500, 7)], units=UNITS)
    drawn = {"text": data.open_source("text", [tmp_path / "a", tmp_path / "b"]),
             "speech": data.open_source("speech", [tmp_path / "speech"])}
    mixture, stage = dict(text=2, speech=1), dict(mixture=dict(text=2, speech=1), train="all")
    seen = set()
    for batch in data.micro_batches(9, drawn, stage, 2, RUN, VOCAB, ALONE):
        names = data.describe(drawn, mixture, 3, 2, batch.index)
        for i, ids, name in zip(batch.index, batch.ids, names, strict=True):
            folder = {5: "a", 6: "b", 107: "speech"}[ids.mode().values.item()]
            assert name == f"sequence {i} ({'speech' if folder == 'speech' else 'text'}, {tmp_path / folder})"
            seen.add(folder)
    assert seen == {"a", "b", "speech"}


def equal(a, b):
    return all(x.ids.equal(y.ids) and x.targets.equal(y.targets) for x, y in zip(a, b, strict=True))


def test_loader_yields_all_steps_from_the_first_on(folders):
    drawn = sources(folders)
    for first, steps in ((0, 7), (5, 7), (6, 7), (7, 7), (0, 1)):
        stage = dict(mixture=MIXTURE, train="all", steps=steps)
        made = list(data.loader(drawn, stage, 2, first, RUN, VOCAB, ALONE))
        assert [step for step, _ in made] == list(range(first, steps))
        for step, batches in made:
            assert equal(batches, data.micro_batches(step, drawn, stage, 2, RUN, VOCAB, ALONE))


def test_loader_raises_an_error_at_its_step(folders, monkeypatch):
    real, stage, steps = data.micro_batches, dict(mixture=MIXTURE, train="all", steps=9), []

    def fail(step, *arguments):
        if step == 3:
            raise DataError("disk gone")
        return real(step, *arguments)
    monkeypatch.setattr(data, "micro_batches", fail)
    with pytest.raises(DataError, match="disk gone"):
        for step, _ in data.loader(sources(folders), stage, 2, 1, RUN, VOCAB, ALONE):
            steps.append(step)
    assert steps == [1, 2]


def test_loader_works_ahead_and_stops_when_it_is_left(folders, monkeypatch):
    real, made, threads = data.micro_batches, [], threading.active_count()
    third, stage = threading.Event(), dict(mixture=MIXTURE, train="all", steps=10**9)

    def count(step, *arguments):
        made.append(step)
        if step == 2:
            third.set()
        return real(step, *arguments)
    monkeypatch.setattr(data, "micro_batches", count)
    for step, _ in data.loader(sources(folders), stage, 2, 0, RUN, VOCAB, ALONE):
        assert step == 0 and third.wait(60)
        break
    assert threading.active_count() == threads and made == [0, 1, 2]


def test_prompt_sequence():
    config = SimpleNamespace(eos_token_id=0, speech_eos=120, switch=121)
    lay_out = data.prompt_sequence
    assert lay_out([1, 2], [3], ("text", "text"), config) == ([0, 1, 2, 3], (3, 4))
    assert lay_out([1, 2], [103], ("text", "speech"), config) == ([0, 1, 2, 121, 103], (4, 5))
    assert lay_out([101], [3, 4], ("speech", "text"), config) == ([120, 101, 121, 3, 4], (3, 5))
    assert lay_out([101], [3], ("speech", "text"), config, prefix=[7]) == ([0, 7, 121, 101, 121, 3], (5, 6))
    assert lay_out([], [103, 104], ("speech", "speech"), config) == ([120, 103, 104], (1, 3))
    assert lay_out([], [103, 104], ("speech", "speech"), config, bos=False) == ([103, 104], (1, 2))
    assert lay_out([1], [2], ("text", "text"), config, whole=True) == ([0, 1, 2], (1, 3))
