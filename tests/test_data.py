"""data.py and runtime/datasets.py: sets on disk, and sampling against a slow and obvious implementation."""
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
from model import make_layout
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
        kinds = data.kinds_of(MIXTURE, index)
        assert (rows[kinds == "text"] < 100).all()
        assert ((rows[kinds == "speech"] >= 100) & (rows[kinds == "speech"] < 121)).all()
        everything |= dict(zip(index.tolist(), rows.tolist(), strict=True))
    for i, row in everything.items():
        alone = data.sample(sources(folders), MIXTURE, 1, 2, [i], 33, VOCAB)
        assert alone[0].tolist() == row


def test_kinds_come_in_exact_parts():
    kinds = data.kinds_of(dict(text=1, speech=2, interleaved=3), np.arange(600)).tolist()
    assert [kinds.count(k) for k in ("text", "speech", "interleaved")] == [100, 200, 300]
    assert all({"text", "speech", "interleaved"} == set(data.kinds_of(MIXTURE, np.arange(i, i + 3))) for i in range(9))


def test_windows_reach_both_ends_and_differ_by_seed_and_stage(folders):
    shard, index = datasets.open_set(folders / "text"), np.arange(200)
    length = len(shard.text) - 1  # two places to start
    rows = data.windows(shard, "text", 0, 0, index, length, VOCAB)
    first = (rows == shard.text[:-1]).all(1)
    assert 60 < first.sum() < 140 and (rows[~first] == shard.text[1:]).all()
    for seed, stage in ((1, 0), (0, 1)):
        assert (data.windows(shard, "text", seed, stage, index, length, VOCAB) != rows).any()


def test_sets_are_drawn_by_size_or_by_weight(tmp_path):
    for name, token, size in (("set/a", 5, 900), ("set/b", 6, 100)):
        datasets.write_set(tmp_path / name, "text", [np.full(size, token)], TOKENIZER)
    index, a, b = np.arange(4000), tmp_path / "set/a", tmp_path / "set/b"
    for sets, share in (([a, b], 901 / 1002), ({a: 0.2, b: 0.6}, 0.25), ([tmp_path / "set"], 901 / 1002)):
        source = data.open_source("text", sets)
        rows = data.sample({"text": source}, dict(text=1), 3, 0, index, 9, VOCAB)
        assert (rows == 5).any(1).mean() == pytest.approx(share, abs=0.03) and source.cumulated[0] == share


# ---------------------------------------------------------------------------------------------------------------------
# faults of data sets: one line that names the file

def put(position, value):
    """A function that changes one element of an array."""
    def change(array):
        array = array.copy()
        array[position] = value
        return array
    return change


def overflow(array):
    """Offsets whose differences seem to rise only because they overflow."""
    return np.concatenate([array[:3], [2**63 - 1, -2], array[5:]])


@pytest.fixture
def paired(folders, tmp_path):
    """A copy of the paired set, to be damaged."""
    return shutil.copytree(folders / "paired", tmp_path / "set")


@pytest.mark.parametrize("name, change, message", [
    ("text", put(3, 100), "text.npy: holds a number outside 0..99"),
    ("speech", put(3, 21), "speech.npy: holds a number outside 0..20"),
    ("text", lambda a: a[:-1], "text.npy: is uint16 .*, not uint16"),
    ("text", lambda a: a.astype(np.int32), "text.npy: is int32 .*, not uint16"),
    ("text", lambda a: a[None], "text.npy: is uint16 .*, not uint16"),
    ("text", put(-1, 7), "text.npy: has a document that does not end with its EOS"),
    ("text_words", put(4, 0), "text_words.npy: has offsets that do not rise"),
    ("text_words", overflow, "text_words.npy: holds a number outside 0.."),
    ("speech_words", put(4, 10**6), "speech_words.npy: holds a number outside 0.."),
    ("text_words", put(0, 1), "text_words.npy: goes from 1 to"),
    ("documents", put(1, 0), "documents.npy: has offsets that do not rise"),
    ("documents", put(1, 1), "npy: has a document that does not end with its EOS"),
    ("documents", lambda a: a.astype(np.float64), "documents.npy: is float64 .*, not int64"),
    ("documents", lambda a: np.array([0, {}], object), "documents.npy: cannot be read")])
def test_faults_of_arrays_are_named(paired, name, change, message):
    datasets.open_set(paired)
    np.save(paired / f"{name}.npy", change(np.load(paired / f"{name}.npy")), allow_pickle=True)
    with pytest.raises(DataError, match=message):
        datasets.open_set(paired)


@pytest.mark.parametrize("change, message", [
    (dict(kind="video"), "meta.json: not a data set's description"),
    (dict(format=2), "meta.json: not a data set's description .*format 2, not 1"),
    (dict(words="many"), "meta.json: not a data set's description"),
    (dict(speech=dict(tokens=3)), "meta.json: not a data set's description"),
    (dict(text=dict(tokens=3, vocab_size=100, eos=[])), "meta.json: not a data set's description"),
    (dict(documents=41), "documents.npy: is int64")])
def test_faults_of_descriptions_are_named(paired, change, message):
    meta = json.loads((paired / "meta.json").read_text())
    (paired / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(DataError, match=message):
        datasets.open_set(paired)


@pytest.mark.parametrize("use, message", [
    (lambda folders: datasets.open_set(folders), "no data set here"),
    (lambda folders: datasets.open_set(folders / "paired", tokenizer="x"), "made with text tokenizer 't', the"),
    (lambda folders: datasets.open_set(folders / "speech", units="x"), "made with speech vocabulary 'u', the"),
    (lambda folders: data.open_source("interleaved", [folders / "text"]), "a text set cannot give interleaved"),
    (lambda folders: data.open_source("text", []), "text: no data set named"),
    (lambda folders: data.open_source("text", [folders / "text"], length=1531), "1530 tokens, fewer than a"),
    (lambda folders: data.open_source("text", {folders / "text": -1}), "the weights of the data sets are .*; give pos"),
    (lambda folders: datasets.write_set(folders / "text", "text", [[1]], TOKENIZER), "exists already")])
def test_wrong_uses_are_refused(folders, use, message):
    with pytest.raises(DataError, match=message):
        use(folders)


def test_the_full_check_compares_the_hash(paired):
    array = np.load(paired / "speech.npy")
    np.save(paired / "speech.npy", put(3, (array[3] + 1) % 20)(array))  # a unit like any other
    datasets.open_set(paired)
    with pytest.raises(DataError, match="set: a file is not as it was written"):
        datasets.open_set(paired, full=True)
    meta = json.loads((paired / "meta.json").read_text())
    del meta["sha256"]  # older sets have none
    (paired / "meta.json").write_text(json.dumps(meta))
    datasets.open_set(paired, full=True)


def test_data_py_checks_every_shard(folders, tmp_path):
    def data_py(*arguments):
        done = subprocess.run([sys.executable, data.__file__, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    for i in range(2):
        shutil.copytree(folders / "paired", tmp_path / f"shards/shard-{i}-of-2-00000")
    code, out, _ = data_py(tmp_path / "shards")
    assert code == 0 and out.count('"sha256"') == 2
    (tmp_path / "shards/shard-1-of-2-00000/text.npy").write_bytes(b"")
    code, _, error = data_py(tmp_path / "shards")
    assert code == 1 and "shard-1-of-2-00000/text.npy: cannot be read" in error
    code, out, _ = data_py("--help")
    assert code == 0 and "python data.py FOLDER" in out
    code, _, error = data_py()
    assert code == 1 and error == "name the folder of a data set: python data.py FOLDER\n"


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


def test_a_set_whose_corpus_fails_leaves_nothing(tmp_path):
    def documents():
        yield [1, 2]
        raise RuntimeError("the corpus ends here")
    with pytest.raises(RuntimeError):
        datasets.write_set(tmp_path / "set", "text", documents(), TOKENIZER)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
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
        if not skips:
            layout = make_layout(batch.ids, batch.targets, VOCAB)
            assert all(ours is None or ours.equal(theirs) for ours, theirs in zip(batch.layout, layout))


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
