"""data.py and runtime/datasets.py: sets on disk, and sampling against a slow and obvious implementation."""
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


def sources(folders):
    names = dict(text="text", speech="speech", interleaved="paired")
    return {kind: data.open_source(kind, [folders / name], "t", "u") for kind, name in names.items()}


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


def put(position, value):
    """A function that changes one element of an array."""
    def change(array):
        array = array.copy()
        array[position] = value
        return array
    return change


@pytest.mark.parametrize("name, change, message", [
    ("text", put(3, 100), "text.npy: holds a number outside 0..99"),
    ("text", lambda a: a[:-1], "text.npy: is uint16 .*, not uint16"),
    ("text", put(-1, 7), "text.npy: has a document that does not end with its EOS"),
    ("text_words", put(4, 0), "text_words.npy: has offsets that do not rise"),
    ("text_words", put([3, 4], [2**63 - 1, -2]), "text_words.npy: holds a number outside 0.."),  # differences overflow
    ("text_words", put(0, 1), "text_words.npy: goes from 1 to"),
    ("text_words", lambda a: put(-2, a[-2] - 1)(a), "text.npy: has a document that does not end with its EOS"),
    ("documents", lambda a: np.array([0, {}], object), "documents.npy: cannot be read"),
    ("meta", dict(format=2), "meta.json: not a data set's description .*format 2, not 1"),
    ("meta", dict(documents=41), "documents.npy: is int64")])
def test_faults_of_files_are_named(folders, tmp_path, name, change, message):
    folder = shutil.copytree(folders / "paired", tmp_path / "set")
    if name == "meta":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | change))
    else:
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")), allow_pickle=True)
    with pytest.raises(DataError, match=message):
        datasets.open_set(folder)


@pytest.mark.parametrize("use, message", [
    (lambda folders: datasets.open_set(folders), "no data set here"),
    (lambda folders: datasets.open_set(folders / "paired", tokenizer="x"), "made with text tokenizer 't', the"),
    (lambda folders: datasets.open_set(folders / "speech", units="x"), "made with speech vocabulary 'u', the"),
    (lambda folders: data.open_source("interleaved", [folders / "text"]), "a text set cannot give interleaved"),
    (lambda folders: data.open_source("text", [folders / "text"], length=1531), "1530 tokens, fewer than a"),
    (lambda folders: data.open_source("text", {folders / "text": -1}), "the weights of the data sets are .*; give")])
def test_wrong_uses_are_refused(folders, use, message):
    with pytest.raises(DataError, match=message):
        use(folders)


def test_data_py_compares_the_hash_of_every_shard(folders, tmp_path):
    for i in range(2):
        folder = shutil.copytree(folders / "paired", tmp_path / f"shard-{i}")
    array = np.load(folder / "speech.npy")
    np.save(folder / "speech.npy", put(3, (array[3] + 1) % 20)(array))  # a unit like any other
    datasets.open_set(folder)
    done = subprocess.run([sys.executable, data.__file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count('"sha256"') == 1
    assert "shard-1: a file is not as it was written" in done.stderr


@pytest.mark.parametrize("position, value, message, is_sampled", [
    (70_000, 100, "holds a number outside", False), (99 + 100 * 40, 5, "does not end with its EOS", False),
    (0, 100, "holds a number outside", True), (-1, 5, "does not end with its EOS", True)])
def test_long_arrays_are_checked_in_samples(tmp_path, monkeypatch, position, value, message, is_sampled):
    """A fault between the samples is found only by the full check. Faults at both ends are always found."""
    monkeypatch.setattr(datasets, "FULL_CHECK", 1 << 17)
    datasets.write_set(tmp_path / "set", "text", np.full((1 << 16, 99), 5), TOKENIZER)
    path = tmp_path / "set" / "text.npy"
    np.save(path, put(position, value)(np.load(path)))
    if not is_sampled:
        datasets.open_set(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        datasets.open_set(tmp_path / "set", full=not is_sampled)


RUN = SimpleNamespace(seed=3, batch_tokens=64 * 12, sequence_length=64, micro_batch=5, text_span=(10, 30),
                      speech_span=(5, 15))


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_global_batches_do_not_depend_on_the_processes(folders, size, step=7):
    drawn, stage, found = sources(folders), dict(mixture=MIXTURE, train="all"), {}
    for rank in range(size):
        for batch in data.micro_batches(step, drawn, stage, 2, RUN, VOCAB, World(rank, 0, size)):
            for i, ids, targets in zip(batch.index, batch.ids, batch.targets, strict=True):
                assert i not in found and ids[1:].equal(targets[:-1])
                found[i] = [*ids.tolist(), targets[-1].item()]
    numbers = range(12 * step, 12 * step + 12)
    assert found == {i: data.sample(drawn, MIXTURE, 3, 2, [i], 65, VOCAB)[0].tolist() for i in numbers}


@pytest.mark.parametrize("train", ["all", "new", "text"])
@pytest.mark.parametrize("mixture, sizes", [
    (dict(text=1), [4, 4, 4]), (MIXTURE, [4, 4, 4]), (dict(text=3, interleaved=1), [5, 4, 3])])
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


def test_loader_yields_all_steps_from_the_first_on(folders):
    drawn, stage = sources(folders), dict(mixture=MIXTURE, train="all", steps=7)
    for first in (0, 5, 7):
        made = list(data.loader(drawn, stage, 2, first, RUN, VOCAB, ALONE))
        assert [step for step, _ in made] == list(range(first, 7))
        for step, batches in made:
            for ours, theirs in zip(batches, data.micro_batches(step, drawn, stage, 2, RUN, VOCAB, ALONE), strict=True):
                assert ours.ids.equal(theirs.ids) and ours.targets.equal(theirs.targets)


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


def test_prompt_sequence():
    config = SimpleNamespace(eos_token_id=0, speech_eos=120, switch=121)
    lay_out = data.prompt_sequence
    assert lay_out([1, 2], [103], ("text", "speech"), config) == ([0, 1, 2, 121, 103], (4, 5))
    assert lay_out([101], [3, 4], ("speech", "text"), config) == ([120, 101, 121, 3, 4], (3, 5))
    assert lay_out([101], [3], ("speech", "text"), config, prefix=[7, 0]) == ([7, 0, 101, 121, 3], (4, 5))
    assert lay_out([], [103, 104], ("speech", "speech"), config, bos=False) == ([103, 104], (1, 2))
    assert lay_out([1], [2], ("text", "text"), config, whole=True) == ([0, 1, 2], (1, 3))
