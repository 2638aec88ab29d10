"""corpora/tokens.py and corpora/slamkit.py: units and tokens that others made become our data sets."""
import json
import re
import shutil

import numpy as np
import pytest
from test_corpora import documents, dropped

from corpora import demo, slamkit, tokens
from data import open_source
from runtime.tokenizer import Tokenizer
from speech.units import vocabulary_hash

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[speech]'")

N_UNITS, FRAME = 500, 0.04  # as in the release: 500 units, so that the EOS is 500; 25 frames a second
TEXTS = ["She had your dark suit.", "It's the king, and he ran!", "A little dog sat down.", "Who knows?",
         "The well-known café closed\n\nat noon."]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder with a tokenizer.json, and with HuBERT units whose model is not there: only their hash is needed."""
    folder = tmp_path_factory.mktemp("tools")
    demo.train_tokenizer(TEXTS * 3, 285, folder / "tokenizer.json")
    (folder / "units").mkdir()
    centroids = np.random.default_rng(0).normal(size=(N_UNITS, 4)).astype(np.float32)
    np.save(folder / "units/centroids.npy", centroids)
    about = dict(kind="hubert", n_units=N_UNITS, rate=25, hash=vocabulary_hash(centroids), model="missing")
    (folder / "units/units.json").write_text(json.dumps(about))
    return folder


def run(name, tools, source, out, **options):
    """Run the command line of a script in this process. Return the report."""
    given = dict(source=source, out=out, units=tools / "units", tokenizer=tools / "tokenizer.json") | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [name, *(f"--{key}={value}" for key, value in given.items())])
        dict(tokens=tokens, slamkit=slamkit)[name].main()
    return json.loads(next(out.glob("report*.json")).read_text())


def tell(text, tokenizer, rng):
    """Invent a recording of a text -> dict of units, durations, word ends in seconds, text ids, and tokens a word."""
    words = re.findall(r"\s*\S+", text)
    ids = [tokenizer.encode(word) for word in words]
    units = rng.permutation(N_UNITS)[:rng.integers(4, 6) * len(words)]
    durations = rng.integers(1, 4, len(units))
    frames = int(durations.sum())
    ends = np.sort(rng.choice(np.arange(1, frames), len(words), replace=False)) * FRAME + 0.01
    return dict(units=units.tolist(), durations=durations.tolist(), ends=ends.tolist(), ids=sum(ids, []),
                sizes=[len(word) for word in ids])


def write_split(folder, samples, eos, len_type="<u8", name="train", speech=True, text=True):
    """Write samples in the layout of the release."""
    both = [(folder / "mhubert25hzl11", "units", N_UNITS)] * speech + [(folder / "smollm", "ids", eos)] * text
    for place, key, end in both:
        place.mkdir(parents=True, exist_ok=True)
        rows = [[*sample[key], end] for sample in samples]
        np.array(sum(rows, []), "<u2").tofile(place / f"{name}.bin")
        np.array([len(row) for row in rows], len_type).tofile(place / f"{name}.len")
    if speech:
        frames = [[*sample["durations"], 1] for sample in samples]
        np.array(sum(frames, []), np.uint8).tofile(folder / f"mhubert25hzl11/{name}.dur")
    if speech and text:
        ends = [[*sample["ends"], sample["ends"][-1]] for sample in samples]  # the EOS has a time, too
        np.array(sum(ends, []), "<f4").tofile(folder / f"smollm/{name}.wrds_tms")
        sizes = [[*sample["sizes"], 1] for sample in samples]
        np.array(sum(sizes, []), "<u8").tofile(folder / f"smollm/{name}.wrds_tms_len")


def expected(sample):
    """Read a sample frame by frame: a unit belongs to the word in which its last frame lies, a pause to the next."""
    frames = np.repeat(np.arange(len(sample["units"])), sample["durations"])
    spoken = [[] for _ in sample["sizes"]]
    for unit, value in enumerate(sample["units"]):
        time = (np.flatnonzero(frames == unit)[-1] + 1) * FRAME  # its last frame ends here
        owner = next((i for i, end in enumerate(sample["ends"]) if time <= end + 1e-4), len(spoken) - 1)
        spoken[owner].append(value)
    ids, written = list(sample["ids"]), []
    for size in sample["sizes"]:
        written.append(ids[:size])
        del ids[:size]
    return written, spoken


@pytest.fixture
def samples(tools):
    rng, tokenizer = np.random.default_rng(1), Tokenizer(tools / "tokenizer.json")
    return [tell(TEXTS[i % len(TEXTS)], tokenizer, rng) for i in range(24)]


@pytest.mark.parametrize("len_type", ["<u8", "<u2"])
def test_a_split_with_word_times_becomes_a_paired_set(tools, samples, tmp_path, len_type):
    """24 lengths of 16 bits also make six numbers of 64 bits, so the file's size does not tell its type."""
    tokenizer = Tokenizer(tools / "tokenizer.json")
    write_split(tmp_path / "set", samples, tokenizer.eos, len_type)
    report = run("tokens", tools, tmp_path / "set", tmp_path / "out")
    assert documents(tmp_path / "out") == [expected(sample) for sample in samples]
    assert report["documents"] == 24 and report["dropped"] == {} and report["kind"] == "paired"
    assert report["words"] == sum(len(sample["sizes"]) for sample in samples)
    assert report["hours"] == pytest.approx(sum(sum(sample["durations"]) for sample in samples) * FRAME / 3600)
    hashes = tokenizer.hash, json.loads((tools / "units/units.json").read_text())["hash"]
    assert len(open_source("interleaved", [tmp_path / "out"], *hashes).shards) == 1


def test_speech_or_text_alone(tools, samples, tmp_path):
    eos = Tokenizer(tools / "tokenizer.json").eos
    for kind, key in (("speech", "units"), ("text", "ids")):
        write_split(tmp_path / kind, samples, eos, name="dev", **{"text": kind == "text", "speech": kind == "speech"})
        report = run("tokens", tools, tmp_path / kind, tmp_path / f"out-{kind}", split="dev")
        assert documents(tmp_path / f"out-{kind}") == [sample[key] for sample in samples] and report["kind"] == kind
    assert report["words"] == sum(len(TEXTS[i % len(TEXTS)].split()) for i in range(24))
    (tmp_path / "speech/mhubert25hzl11/dev.dur").unlink()  # a speech set does not need it
    assert run("tokens", tools, tmp_path / "speech", tmp_path / "out", split="dev")["hours"] == 0
    shutil.copytree(tmp_path / "text/smollm", tmp_path / "speech/smollm")
    with pytest.raises(SystemExit, match="dev.wrds_tms is missing.*write --kind=speech or --kind=text"):
        run("tokens", tools, tmp_path / "speech", tmp_path / "neither", split="dev")


def test_times_on_the_border_of_a_frame_survive_32_bits(tools, samples, tmp_path):
    """20.48 s is frame 512, but as float32 it is less. Long words are no fault, because they hold the pauses."""
    sample = samples[3] | dict(units=[1, 2, 2, 3], durations=[255, 200, 57, 100], ends=[20.48, 24.04])
    assert 25 * float(np.float32(20.48)) < 512 - 1e-6
    write_split(tmp_path / "set", [sample], Tokenizer(tools / "tokenizer.json").eos)
    run("tokens", tools, tmp_path / "set", tmp_path / "out")
    assert [spoken for _, spoken in documents(tmp_path / "out")] == [[[1, 2], [3]]]


def test_equal_neighbours_are_one_unit_and_a_short_word_has_none(tools, samples, tmp_path):
    """255 frames fit .dur, so a longer run takes two entries. The third word ends within the unit of the second."""
    sample = samples[0] | dict(units=[7, 7, 9, 9, 4], durations=[255, 45, 1, 1, 10],
                               ends=[11.9, 12.04, 12.05, 12.1, 12.48])
    write_split(tmp_path / "set", [sample], Tokenizer(tools / "tokenizer.json").eos)
    run("tokens", tools, tmp_path / "set", tmp_path / "out")
    assert [spoken for _, spoken in documents(tmp_path / "out")] == [[[], [7], [], [9], [4]]]


def change(name, at, value, dtype):
    """A function that changes one number in a file of a set."""
    def damage(folder):
        array = np.fromfile(folder / name, dtype)
        array[at] = value
        array.tofile(folder / name)
    return damage


def cut(name, size):
    """A function that cuts bytes off the end of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-size])


def remove(name):
    return lambda folder: (folder / name).unlink()


SHORT = [dict(units=[1, 2], durations=[9, 9], ends=[0.7], ids=[30], sizes=[1])]
SPEECH, TEXT = "mhubert25hzl11/train", "smollm/train"


@pytest.mark.parametrize("damage, message", [
    (cut(f"{SPEECH}.bin", 2), "train.len: neither as uint64 nor as uint16 are these lengths that sum to the"),
    (cut(f"{SPEECH}.bin", 1), "train.bin: cannot be read .*not a multiple"),
    (change(f"{TEXT}.len", 2, 1 << 63, "<u8"), "train.len: neither as uint64"),
    (cut(f"{SPEECH}.dur", 1), "train.dur: [0-9]+ durations, but [0-9]+ tokens in .*train.bin"),
    (cut(f"{TEXT}.wrds_tms", 4), "train.wrds_tms: [0-9]+ word ends, but [0-9]+ words in .*wrds_tms_len"),
    (change(f"{TEXT}.wrds_tms_len", 1, 77, "<u8"), "train.wrds_tms_len: sample 0 of the text does not end where a"),
    (change(f"{TEXT}.wrds_tms_len", 1, 1 << 62, "<u8"), "train.wrds_tms_len: a word of 4611686018427387904 tokens"),
    (change(f"{TEXT}.wrds_tms_len", -1, 2, "<u8"), "train.wrds_tms_len: sample 23 of the text does not end where"),
    (change(f"{SPEECH}.bin", 5, 501, "<u2"), "train.bin: sample 0 holds 501, but --units only goes up to 500; give"),
    (change(f"{TEXT}.bin", 2, 60000, "<u2"), "smollm/train.bin: sample 0 holds 60000, but --tokenizer only goes up"),
    (lambda folder: write_split(folder, SHORT, 5, text=False), "smollm/train.len: 24 samples, but 1 in .*train.len"),
    (lambda folder: write_split(folder, SHORT, 5), "smollm/train.bin: sample 0 ends with 5, not with the EOS 0 of"),
    *[(remove(f"{stem}.{ending}"), f"{stem}.{ending}: cannot be read .No such file.*; copy the file again")
      for stem, ending in ((SPEECH, "bin"), (SPEECH, "len"), (SPEECH, "dur"), (TEXT, "bin"), (TEXT, "len"),
                           (TEXT, "wrds_tms_len"))],
    (shutil.rmtree, "neither .*mhubert25hzl11/train.bin nor .*smollm/train.bin is there; check --split"),
])
def test_damaged_files_are_named(tools, samples, tmp_path, damage, message):
    write_split(tmp_path / "set", samples, Tokenizer(tools / "tokenizer.json").eos)
    damage(tmp_path / "set")
    with pytest.raises(SystemExit, match=message) as error:
        run("tokens", tools, tmp_path / "set", tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("key, at, value, reason", [
    ("ends", 2, 0.0, "impossible word times"),  # it falls
    ("ends", -1, 99.0, "word times outside the audio"),
    ("ends", 1, float("nan"), "word without a time"),
    ("durations", 3, 0, "impossible durations"),
    ("units", 4, 500, "EOS inside a sample"),
    ("ids", 3, "eos", "EOS inside a sample"),
    ("sizes", slice(0, 2), "moved", "tokens are not words"),  # the second word gets a letter of the first
    ("sizes", slice(0, 2), "joined", "tokens are not words"),
])
def test_a_faulty_sample_is_dropped_and_the_others_are_kept(tools, samples, tmp_path, key, at, value, reason):
    bad, eos = dict(samples[6], **{key: list(samples[6][key])}), Tokenizer(tools / "tokenizer.json").eos
    first, second = bad["sizes"][:2]
    bad[key][at] = {"eos": eos, "moved": [first - 1, second + 1], "joined": [first + second, 0]}.get(value, value)
    assert first > 1 and bad != samples[6]
    write_split(tmp_path / "set", [*samples[:6], bad, *samples[7:]], eos)
    report = run("tokens", tools, tmp_path / "set", tmp_path / "out")
    assert report["dropped"] == {reason: 1} and report["items"] == 24
    assert list(dropped(tmp_path / "out")) == ["set/train:6"]
    assert documents(tmp_path / "out") == [expected(sample) for sample in samples[:6] + samples[7:]]


def test_parts_shards_and_pieces_change_nothing(tools, samples, tmp_path, monkeypatch):
    """600 samples in 3 shards, whose parts were partly lost, with the words read a few at a time."""
    many = samples * 25
    write_split(tmp_path / "set", many, Tokenizer(tools / "tokenizer.json").eos)
    sizes = np.fromfile(tmp_path / "set/smollm/train.wrds_tms_len", "<u8")
    bounds = np.cumsum([0] + [len(sample["ids"]) + 1 for sample in many])
    whole = tokens.first_words("x", sizes, bounds)
    assert whole.tolist() == np.cumsum([0] + [len(sample["sizes"]) + 1 for sample in many]).tolist()
    monkeypatch.setattr(tokens, "PIECE", 7)
    assert (tokens.first_words("x", sizes, bounds) == whole).all()

    run("tokens", tools, tmp_path / "set", tmp_path / "whole", part_tokens=300)
    assert len(list((tmp_path / "whole").glob("*/part.json"))) == 3  # of 256 samples
    shutil.rmtree(tmp_path / "whole/shard-0-of-1-00002")
    run("tokens", tools, tmp_path / "set", tmp_path / "whole", part_tokens=300)  # makes the last part again
    for i in (2, 0, 1):
        run("tokens", tools, tmp_path / "set", tmp_path / "shards", shard=f"{i}/3")
    wanted = [expected(sample) for sample in samples] * 25
    assert documents(tmp_path / "whole") == documents(tmp_path / "shards") == wanted
    with pytest.raises(SystemExit, match="was made with part_tokens 300, now it is"):
        run("tokens", tools, tmp_path / "set", tmp_path / "whole")


# slamkit

FEATURES = [  # two lines in the form of example_data/features.jsonl, with other numbers
    '{"units": [5, 61, 7, 402, 33], "duration": [1, 2, 1, 4, 2], "file_name": "../example_data/audio/one.flac"}',
    '{"units": [12, 499, 0], "duration": [3, 1, 6], "file_name": "../example_data/audio/two.flac"}']
TOKENS = [  # the same two in the form of example_data/tokens.jsonl
    '{"file_name": "../example_data/audio/one.flac", "audio_repr": "<Un5><Un61><Un7><Un402><Un33>"}',
    '{"file_name": "../example_data/audio/two.flac", "audio_repr": "<Un12><Un499><Un0>"}']


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_both_forms_of_slamkit_give_the_same_set(tools, tmp_path):
    sources = write_lines(tmp_path / "in/f.jsonl", FEATURES), write_lines(tmp_path / "in/t.jsonl", TOKENS)
    for source, hours in zip(sources, (20 * FRAME / 3600, 0)):
        report = run("slamkit", tools, source, tmp_path / f"out-{source.stem}", tokenizer="")
        assert documents(tmp_path / f"out-{source.stem}") == [[5, 61, 7, 402, 33], [12, 499, 0]]
        assert report["hours"] == pytest.approx(hours) and report["kind"] == "speech"
    for i in (1, 0):
        run("slamkit", tools, sources[0], tmp_path / "shards", shard=f"{i}/2")
    assert documents(tmp_path / "shards") == documents(tmp_path / "out-f")
    with pytest.raises(SystemExit, match="t.jsonl and .*f.jsonl have both forms"):
        run("slamkit", tools, tmp_path / "in", tmp_path / "both")


def test_slamkit_with_word_times_gives_a_paired_set(tools, tmp_path):
    """One unit reaches into the second word and so belongs to it. The second recording has no times."""
    meta = dict(file_name="one.flac", text="She had your", aligned_text=[["She", 0, 0.1], [" had", 0.1, 0.2],
                                                                         [" your", 0.24, 0.36]])
    write_lines(tmp_path / "meta/one.json", [json.dumps(meta)])
    source = write_lines(tmp_path / "f.jsonl", [*FEATURES, *TOKENS[:1]])
    report = run("slamkit", tools, source, tmp_path / "out", meta=tmp_path / "meta")
    words = Tokenizer(tools / "tokenizer.json").encode_words(["She", "had", "your"])
    assert documents(tmp_path / "out") == [(words, [[5], [61, 7], [402, 33]])]
    assert report["dropped"] == {"no word times": 1, "no durations": 1} and report["kind"] == "paired"
    with pytest.raises(ValueError, match="^word without tokens: 'b'"):  # of bytes that no token has
        tokens.paired_document(["a", "b"], [[3], []], [(0, 0.1), (0.1, 0.2)], np.arange(9), np.ones(9, int), 25)


@pytest.mark.parametrize("line, reason", [
    ('{"units": [1, 2], "duration": [1]}', "unreadable record: f.jsonl:2: cannot be read .*2 units, but 1 durations"),
    ('{"units": [1, -2], "duration": [1, 1]}', "unreadable record: .*not a list of integers"),
    ('{"units": [1, 18446744073709551615], "duration": [1, 1]}', "unreadable record: .*not a list of integers"),
    ('{"units": ["1"], "duration": [1]}', "unreadable record: .*not a list of integers"),
    ('{"units": [], "duration": []}', "empty sample: f.jsonl:2"),
    ('{"file_name": "a"}', "unreadable record: .*KeyError: .units"),
    ("{", "unreadable record: f.jsonl:2"),
    ('{"audio_repr": "<speech><Un1><text> had"}', "not only units: f.jsonl:2 holds .<speech><Un1><text> had"),
    ('{"audio_repr": ""}', "empty sample: f.jsonl:2"),
    ('{"audio_repr": 3}', "unreadable record: f.jsonl:2"),
])
def test_a_faulty_line_of_slamkit_is_dropped(tools, tmp_path, line, reason):
    source = write_lines(tmp_path / "f.jsonl", [FEATURES[0], line, FEATURES[1]])
    run("slamkit", tools, source, tmp_path / "out")
    assert documents(tmp_path / "out") == [[5, 61, 7, 402, 33], [12, 499, 0]]
    (found,) = dropped(tmp_path / "out").values()
    assert re.match(reason, found)


@pytest.mark.parametrize("lines, message", [
    ([*FEATURES, '{"units": [500], "duration": [1]}'], "f.jsonl:3: unit 500, but --units has 500; give the"),
    ([], "no items found"),
    (["{}"], "not one document from 1 items; dropped"),
])
def test_wrong_files_of_slamkit_end_the_run(tools, tmp_path, lines, message):
    with pytest.raises(SystemExit, match=message):
        run("slamkit", tools, write_lines(tmp_path / "f.jsonl", lines), tmp_path / "out")
