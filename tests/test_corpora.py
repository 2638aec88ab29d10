"""speech.read_audio and corpora/: every layout from files to data sets; bad items, shards, interruptions."""
import gzip
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import common, demo, files, tedlium
from data import open_source
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech.audio import read_audio
from speech.mel import MelUnits, fit_mel_units, load_mel_units, mel_frames, save_mel_units
from speech.units import load_units

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[speech]'")

RATE, WORD = 16000, 0.32  # Hz; seconds that a word takes here
SENTENCES = ["She had your dark suit.", "It's the king, and he ran!", "A little dog sat down.", "Who knows?"]
SPHERE = """NIST_1A
   1024
database_id -s5 TIMIT
utterance_id -s8 cjf0_sa1
channel_count -i 1
sample_count -i {n}
sample_rate -i 16000
sample_n_bytes -i 2
sample_byte_format -s2 01
sample_sig_bits -i 16
{more}end_head
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A tokenizer.json and a folder of mel units."""
    folder = tmp_path_factory.mktemp("tools")
    demo.train_tokenizer(SENTENCES * 3, 300, folder / "tokenizer.json")
    frames = [mel_frames(say(sentence)[0]) for sentence in SENTENCES]
    save_mel_units(str(folder / "units"), fit_mel_units(frames, 12, 0))
    return folder


def say(text):
    """A waveform of one sound per word, and the timed words."""
    rng, pieces = np.random.default_rng(len(text)), []
    words = text.split()
    for word in words:
        pitch, n = 100 + zlib.crc32(word.encode()) % 900, int(WORD * RATE)
        pieces.append(np.sign(np.sin(np.arange(n) * pitch * 6.2832 / RATE)) * np.linspace(0.1, 0.3, n))
    waveform = np.concatenate(pieces) + rng.normal(0, 0.003, len(pieces) * int(WORD * RATE))
    return waveform.astype(np.float32), [(word, i * WORD, (i + 1) * WORD) for i, word in enumerate(words)]


def record(path, text, **options):
    """Say a text into a sound file; returns the timed words."""
    waveform, timed = say(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".sph", ".wav") and "format" not in options:
        header = SPHERE.format(n=len(waveform), more="").encode().ljust(1024)
        path.write_bytes(header + (waveform * 32767).astype("<i2").tobytes())
    else:
        soundfile.write(path, waveform, RATE, **options)
    return timed


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def textgrid(path, timed):
    """As the Montreal Forced Aligner writes it."""
    tier = [(a, b, word.strip(".,!?").lower()) for word, a, b in timed] + [(timed[-1][2], timed[-1][2] + 0.1, "")]
    intervals = [f'{" " * 8}{line}' for i, (a, b, word) in enumerate(tier, 1) for line in (
        f"intervals [{i}]:", f"    xmin = {a}", f"    xmax = {b}", f'    text = "{word}"')]
    write(path, 'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {tier[-1][1]}",
          "tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"',
          '        name = "words"', "        xmin = 0", f"        xmax = {tier[-1][1]}",
          f"        intervals: size = {len(tier)}", *intervals)


def run(name, tools, source, out, **options):
    """The command line of a corpus, in this process; returns the report."""
    given = dict(source=source, out=out, workers=0, units=tools / "units", tokenizer=tools / "tokenizer.json") | options
    before, sys.argv = sys.argv, [name, *(f"--{key}={value}" for key, value in given.items())]
    try:
        runpy.run_module(f"corpora.{name}", run_name="__main__")
    finally:
        sys.argv = before
    reports = sorted(Path(out).glob("report*.json"), key=os.path.getmtime)
    return json.loads(reports[-1].read_text())


def sets(out):
    """The parts of an output folder, in order of shard and part, each checked whole."""
    return [datasets.open_set(path.parent, full=True) for path in sorted(Path(out).glob("*/meta.json"))]


def documents(out):
    """Every document: (ids of its words, units of its words) if paired, else its ids; without EOS."""
    found = []
    for part in sets(out):
        for i in range(part.meta["documents"]):
            if part.meta["kind"] == "paired":
                text, units, text_words, speech_words = part.document(i)
                found.append(tuple([ids[a:b].tolist() for a, b in itertools.pairwise(words)][:-1]
                                   for ids, words in ((text, text_words), (units, speech_words))))
            else:
                stream = part.text if part.meta["kind"] == "text" else part.speech
                found.append(stream[part.documents[i]:part.documents[i + 1] - 1].tolist())
    return found


def dropped(out):
    return {line["id"]: line["reason"] for path in sorted(Path(out).glob("*/dropped.jsonl"))
            for line in map(json.loads, path.read_text().splitlines())}


def expected(tools, text, waveform, ends):
    """A paired document, worked out frame by frame: a unit belongs to the word of its last frame."""
    ids, starts = load_mel_units(str(tools / "units")).encode([waveform])[0]
    n_frames, words = len(waveform) // 640, text.split()
    spoken = [[] for _ in words]
    for unit, last in zip(ids.tolist(), [*(starts[1:] - 1), n_frames - 1]):
        owner = next((i for i, end in enumerate(ends) if last < np.floor(25 * end + 1e-6)), len(words) - 1)
        spoken[owner].append(unit)
    return Tokenizer(tools / "tokenizer.json").encode_words(words), spoken


def expect(tools, *recordings):
    """Paired documents of (path, text) or (path, text, start, end), spoken by say() one word every WORD seconds."""
    found = []
    for path, text, *span in recordings:
        waveform = soundfile.read(path, dtype="float32")[0]
        if span:
            waveform = waveform[round(span[0] * RATE):round(span[1] * RATE)]
        found.append(expected(tools, text, waveform, WORD * np.arange(1, len(text.split()) + 1)))
    return found


# sound files

@pytest.mark.parametrize("suffix, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.2), ("mp3", 0.2)])
def test_audio_of_every_format(tmp_path, suffix, tolerance):
    waveform = say(SENTENCES[0])[0]
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, waveform, RATE)
    read = read_audio(str(path))
    assert read.dtype == np.float32 and read.shape == waveform.shape
    assert np.sqrt(np.mean((read - waveform) ** 2)) < tolerance * 0.3
    assert np.array_equal(read_audio(path.read_bytes(), 0.5), read[8000:])
    assert read_audio(str(path), 1.0, len(waveform) / RATE + 0.09).shape == (len(waveform) - 16000,)


@given(start=st.floats(0, 1.5), length=st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_span_is_a_slice(tmp_path_factory, start, length):
    path = tmp_path_factory.getbasetemp() / "span.flac"
    if not path.exists():
        soundfile.write(path, say(SENTENCES[0])[0], RATE)
    whole, end = read_audio(str(path)), min(start + length, 1.6)
    assert np.array_equal(read_audio(str(path), start, end), whole[round(start * RATE):round(end * RATE)])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_and_channels(tmp_path, rate):
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * t) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], 1), rate)
    read = read_audio(str(tmp_path / "a.wav"), 0.2, 0.7)
    want = np.sin(2 * np.pi * 440 * (0.2 + np.arange(8000) / RATE)) * 0.25  # the mean of both channels
    assert len(read) in (8000, 8001) and np.abs(read[400:7600] - want[400:7600]).max() < 2e-3


def test_sphere(tmp_path):
    waveform, path = say(SENTENCES[0])[0], tmp_path / "SA1.WAV"
    record(path, SENTENCES[0])
    assert np.abs(read_audio(str(path)) - waveform).max() < 1e-4
    assert np.array_equal(read_audio(str(path), 0.1, 0.2), read_audio(str(path))[1600:3200])
    header = SPHERE.format(n=9, more="sample_coding -s26 pcm,embedded-shorten-v2.00\n").encode().ljust(1024)
    path.write_bytes(header + bytes(100))
    with pytest.raises(ValueError, match="^unreadable audio: .*shorten.*convert it: sph2pipe"):
        read_audio(str(path))


def spoil(path, fault):
    """Make a sound file unusable in a certain way."""
    soundfile.write(path, say(SENTENCES[0])[0], RATE, format="FLAC")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    elif fault == "zero bytes":
        path.write_bytes(b"")
    elif fault == "no samples":
        soundfile.write(path, np.zeros(0), RATE, format="WAV")
    elif fault == "not audio":
        path.write_bytes(b"this is no sound file\n" * 50)
    elif fault == "NaN":
        soundfile.write(path, np.array([0.1, np.nan] * 8000), RATE, format="WAV", subtype="FLOAT")
    elif fault == "missing":
        path.unlink()


FAULTS = {"truncated": "unreadable audio", "not audio": "unreadable audio", "missing": "unreadable audio",
          "zero bytes": "empty audio", "no samples": "empty audio", "NaN": "audio is not finite"}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_audio_has_a_reason(tmp_path, fault):
    spoil(tmp_path / "a.flac", fault)
    with pytest.raises(ValueError, match=f"^{FAULTS[fault]}: .*a.flac[^\n]*$"):
        read_audio(str(tmp_path / "a.flac"))


@pytest.mark.parametrize("name", ["a.wav", "a.sph"])
def test_a_cut_file_is_noticed(tmp_path, name):
    """libsndfile takes what is there for all there is."""
    record(tmp_path / name, SENTENCES[0], **dict(format="WAV") if name == "a.wav" else {})
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:len(raw) // 2])
    assert soundfile.info(tmp_path / name).frames > 8000
    with pytest.raises(ValueError, match="^unreadable audio: .* breaks off: [0-9]+ bytes, by its header [0-9]+$"):
        read_audio(str(tmp_path / name))


def test_headers_that_would_fill_the_memory(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(9), 1)  # one sample a second
    with pytest.raises(ValueError, match="^unreadable audio: .*a.wav says 1 samples a second"):
        read_audio(str(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.flac", np.zeros(1600), RATE)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21:26] = b"\xff\xff\xff\xff\xff"  # the number of samples, 36 bits
    (tmp_path / "a.flac").write_bytes(raw)
    with pytest.raises(ValueError, match="^audio too long: .*a.flac; give shorter spans"):
        read_audio(str(tmp_path / "a.flac"))


def test_no_name_leads_out_of_the_source(tmp_path):
    for name in ("in/sph", "in/stm", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/x.sph").write_bytes(b"secret")
    (tmp_path / "in/sph/link").symlink_to(tmp_path / "out")
    (tmp_path / "in/sph/x.sph").symlink_to("../../out/x.sph")
    (tmp_path / "in/sph/y.sph").symlink_to("z.sph")
    names = ["y", "x", "link/x", "../../out/x", "a/../../../out/x", str(tmp_path / "out/x")]
    write(tmp_path / "in/stm/a.stm", *(f"{name} 1 spk 0.0 0.2 <o> a b" for name in names))
    found = [item for item in tedlium.read(tmp_path / "in/stm/a.stm", dict(kind="paired"))]
    assert found[0].audio == str(tmp_path / "in/sph/y.sph")
    assert all(str(bad.error).count("path outside the source") for bad in found[1:]) and len(found) == len(names)


@pytest.mark.parametrize("span", [(-1, None), (5, None), (0, 5), (1, 1), (1, 0.5)])
def test_spans_outside_are_refused(tmp_path, span):
    spoil(tmp_path / "a.flac", None)
    with pytest.raises(ValueError, match="^span outside the audio: "):
        read_audio(str(tmp_path / "a.flac"), *span)


# the corpora

def test_librispeech(tools, tmp_path):
    upper = [sentence.upper().translate(str.maketrans("", "", ".,!?")) for sentence in SENTENCES]
    chapter, other = tmp_path / "LibriSpeech/dev-clean/84/121123", tmp_path / "LibriSpeech/dev-clean/84/9"
    names = [f"84-121123-000{i}" for i in range(3)]
    write(chapter / "84-121123.trans.txt", *(f"{name} {text}" for name, text in zip(names, upper)))
    aligned = tmp_path / "alignments/dev-clean/84"
    for i, (name, text) in enumerate(zip(names, upper)):
        timed = record(chapter / f"{name}.flac", text)
        if i < 2:
            textgrid(aligned / f"121123/{name}.TextGrid", timed)
    write(other / "84-9.trans.txt", f"84-9-0000 {upper[3]}")
    ends = [end for _, _, end in record(other / "84-9-0000.flac", upper[3])]
    write(aligned / "9/84-9.alignment.txt", f'84-9-0000 ",{upper[3].replace(" ", ",")}," "0,{ends[0]},{ends[1]},9.9"')
    source, out = tmp_path / "LibriSpeech", tmp_path / "out"
    report = run("librispeech", tools, source, out, alignments=tmp_path / "alignments")
    spoken = [(chapter / f"{names[i]}.flac", upper[i]) for i in range(2)] + [(other / "84-9-0000.flac", upper[3])]
    assert documents(out) == expect(tools, *spoken)
    assert report["items"] == 4 and report["documents"] == 3 and report["words"] == 13
    assert report["dropped"] == {"no word times": 1} and list(dropped(out)) == [names[2]]
    assert report["hours"] == pytest.approx(13 * WORD / 3600)
    assert report["tokens"]["text"] == sum(len(part.text) for part in sets(out))
    shutil.rmtree(out)
    assert run("librispeech", tools, source, out, kind="speech")["documents"] == 4
    units = [[unit for word in words for unit in word] for _, words in expect(tools, *spoken)]
    assert [units[0], units[1], units[2]] == [documents(out)[i] for i in (0, 1, 3)]


def test_librilight(tools, tmp_path):
    path = tmp_path / "small/100/sea_fairies/01_baum.flac"
    record(path, " ".join(["one two three four five"] * 6))  # 9.6 s
    active = [[0.0, 1.0], [1.5, 2.9], [4.0, 9.6]]
    write(path.with_suffix(".json"), json.dumps(dict(speaker="100", voice_activity=active)))
    record(path.with_name("02_baum.flac"), "one two three four five six")  # no voice activity: 1.92 s
    record(path.with_name("03_baum.flac"), "one")
    write(path.with_name("03_baum.json"), "{}")
    report = run("librilight", tools, tmp_path, tmp_path / "out", segment=3)
    spans = [(0, 2.9), (4, 4 + 5.6 / 2), (4 + 5.6 / 2, 9.6)]
    waveform = soundfile.read(path, dtype="float32")[0]
    book = load_mel_units(str(tools / "units"))
    cut = [waveform[round(a * RATE):round(b * RATE)] for a, b in spans]
    cut.append(soundfile.read(path.with_name("02_baum.flac"), dtype="float32")[0])
    assert documents(tmp_path / "out") == [book.encode([piece])[0][0].tolist() for piece in cut]
    assert report["dropped"] == {"unreadable voice activity": 1}
    with pytest.raises(SystemExit, match="this corpus gives speech"):
        run("librilight", tools, tmp_path, tmp_path / "paired", kind="paired")


class FakeAligner:
    """Stands for the aligner: each word takes WORD seconds; texts with more words than there is time for fail."""
    def __init__(self, monkeypatch, folder):
        self.folder, self.calls = folder, []
        write(folder / "config.json", "{}")
        monkeypatch.setattr(common, "load_aligner", lambda folder, device: self)
        monkeypatch.setattr(common, "align", lambda waveforms, texts, aligner: list(map(self.one, waveforms, texts)))

    def one(self, waveform, text):
        self.calls.append(text)
        n = len(text.split())
        if n * WORD > len(waveform) / RATE + 0.01:
            return ValueError(f"audio too short for its transcript: {n} words")
        return [(i * WORD, (i + 1) * WORD) for i in range(n)]


def test_libriheavy(tools, tmp_path, monkeypatch):
    light = tmp_path / "light"
    record(light / "small/100/sea/01_baum.flac", " ".join(SENTENCES))  # 5, 6, 5, 2 words
    aligner = FakeAligner(monkeypatch, tmp_path / "aligner")

    def cut(i, first, n, text, recording="small/100/sea/01_baum"):
        name, sources = f"{recording}_{i}", [dict(type="file", source=f"download/librilight/{recording}.flac")]
        supervision = dict(id=name, start=0, duration=n * WORD, custom=dict(texts=[text, text.upper()]))
        return dict(id=name, start=first * WORD, duration=n * WORD, channel=0, type="MonoCut",
                    supervisions=[supervision], recording=dict(id=recording, sources=sources))
    cuts = [cut(0, 0, 5, SENTENCES[0]), cut(1, 5, 6, SENTENCES[1]), cut(2, 11, 5, SENTENCES[2] + " and much more text"),
            cut(3, 0, 2, "no such", "small/7/none"), cut(4, 0, 2, "Bad path", "../../etc/x"), dict(id="odd")]
    source = tmp_path / "libriheavy_cuts_small.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))
    report = run("libriheavy", tools, source, tmp_path / "out", audio=light, aligner=aligner.folder)
    path = light / "small/100/sea/01_baum.flac"
    assert documents(tmp_path / "out") == expect(
        tools, (path, SENTENCES[0], 0, 5 * WORD), (path, SENTENCES[1], 5 * WORD, 11 * WORD))
    assert report["dropped"] == {"audio too short for its transcript": 1, "unreadable audio": 1, "unreadable record": 2}
    with pytest.raises(SystemExit, match="--audio"):
        run("libriheavy", tools, source, tmp_path / "out2")


def test_swc(tools, tmp_path):
    article = tmp_path / "english/Anarchism"
    record(article / "audio1.ogg", SENTENCES[0])
    record(article / "audio2.ogg", " ".join(SENTENCES[1:3]))

    def sentence(text, first, timed=True):
        tokens, at = [], first
        for word in text.split():
            plain = word.strip(".,!?")
            time = f' start="{round(at * 320)}" end="{round(at * 320) + 320}"' if timed or at > first else ""
            tokens.append(f'<t>{plain}<n pronunciation="{plain.lower()}"{time}/></t>')
            if plain != word:
                tokens.append(f"<t>{word[len(plain):]}</t>")
            tokens[-1] += " "
            at += 1
        return f"<s>{''.join(tokens).strip()}</s>"
    offsets = "".join(f'<prop key="DC.source.audio.offset" value="{value}" group="{i}"/>'
                      for i, value in enumerate((0, 5 * WORD)))
    second = f"{sentence(SENTENCES[1], 5)} {sentence(SENTENCES[2], 11)} {sentence(SENTENCES[3], 16, False)}"
    write(article / "aligned.swc", f"<article><meta>{offsets}</meta><d><p>{sentence(SENTENCES[0], 0)}</p>",
          f"<p>{second}</p></d></article>")
    write(tmp_path / "english/Broken/aligned.swc", "<article><d>")
    report = run("swc", tools, tmp_path / "english", tmp_path / "out")
    joined = " ".join(SENTENCES[1:3])
    assert documents(tmp_path / "out") == expect(
        tools, (article / "audio1.ogg", SENTENCES[0]), (article / "audio2.ogg", joined))
    assert report["dropped"] == {"no word times": 1, "unreadable file": 1} and report["items"] == 4
    assert run("swc", tools, tmp_path / "english", tmp_path / "speech", kind="speech")["documents"] == 2


def test_tedlium(tools, tmp_path, monkeypatch):
    aligner, talk = FakeAligner(monkeypatch, tmp_path / "aligner"), tmp_path / "legacy/train/stm/AlGore_2009.stm"
    record(talk.parent.parent / "sph/AlGore_2009.sph", "it's the king and he ran down")
    lines = [(0, 2, "<o,f0,male>", "it 's the"), (2, 4, "<o,f0,male>", "king <unk>"),
             (4, 5, "<F0_M>", "ignore_time_segment_in_scoring"), (5, 7, "<o,f0,male>", "ran(2) {NOISE} down <sil>")]
    name = "AlGore_2009 1 AlGore_2009"
    write(talk, *(f"{name} {a * WORD:.2f} {b * WORD:.2f} {label} {text}" for a, b, label, text in lines), f"{name} x")
    report = run("tedlium", tools, tmp_path / "legacy", tmp_path / "out", aligner=aligner.folder)
    path = talk.parent.parent / "sph/AlGore_2009.sph"
    assert documents(tmp_path / "out") == expect(
        tools, (path, "it's the", 0, 2 * WORD), (path, "ran down", 5 * WORD, 7 * WORD))
    assert report["dropped"] == {"unknown word in transcript": 1, "unreadable record": 1}
    assert run("tedlium", tools, tmp_path / "legacy", tmp_path / "speech", kind="speech")["documents"] == 3


def test_timit(tools, tmp_path):
    for folder, names in (("TRAIN/DR1/FCJF0", ("SA1", "SI648", "SX37")), ("test/dr2/mabc0", ("sx1",))):
        for name, sentence in zip(names, SENTENCES):
            case = str.upper if name.isupper() else str.lower
            path = tmp_path / folder / name
            timed = record(path.with_suffix(case(".wav")), sentence)
            write(path.with_suffix(case(".txt")), f"0 {round(timed[-1][2] * RATE)} {sentence}")
            write(path.with_suffix(case(".wrd")), *(f"{round(a * RATE)} {round(b * RATE)} {word.strip('.,!?').lower()}"
                                                    for word, a, b in timed))
    (tmp_path / "TRAIN/DR1/FCJF0/SX37.TXT").unlink()
    report = run("timit", tools, tmp_path, tmp_path / "out")
    paths = [tmp_path / "TRAIN/DR1/FCJF0/SI648.WAV", tmp_path / "test/dr2/mabc0/sx1.wav"]
    assert documents(tmp_path / "out") == expect(tools, (paths[0], SENTENCES[1]), (paths[1], SENTENCES[0]))
    assert report["dropped"] == {"missing file": 1}
    assert run("timit", tools, tmp_path, tmp_path / "sa", sa="true")["documents"] == 3


def test_voxpopuli(tools, tmp_path, monkeypatch):
    aligner, folder = FakeAligner(monkeypatch, tmp_path / "aligner"), tmp_path / "transcribed_data/en"
    names = ["20180117-0900-PLENARY-15-en_20180117-22:00:30_3", "20090112-0900-PLENARY-1-en_1"]
    write(folder / "asr_train.tsv", "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender",
          f"{names[0]}\t{SENTENCES[0]}\tshe had\t1\ttrain\tfemale", f"{names[1]}\t\twho knows\t2\ttrain\tmale", "torn")
    record(folder / "2018" / f"{names[0]}.ogg", SENTENCES[0])
    record(folder / "2009" / f"{names[1]}.ogg", "who knows")
    report = run("voxpopuli", tools, tmp_path, tmp_path / "out", aligner=aligner.folder)
    assert documents(tmp_path / "out") == expect(tools, (folder / "2018" / f"{names[0]}.ogg", SENTENCES[0]),
                                                 (folder / "2009" / f"{names[1]}.ogg", "who knows"))
    assert report["dropped"] == {"unreadable record": 1}
    record(tmp_path / "raw_audios/en/2019/2019_en.ogg", " ".join(SENTENCES))  # 5.76 s
    assert run("voxpopuli", tools, tmp_path, tmp_path / "raw", kind="speech", subset="raw", segment=2)["documents"] == 3
    with pytest.raises(SystemExit, match="--subset=raw has no transcripts"):
        run("voxpopuli", tools, tmp_path, tmp_path / "raw2", subset="raw")


def sound_bytes(folder, text):
    timed = record(folder / "x.flac", text)
    return (folder / "x.flac").read_bytes(), timed


def test_asterisk(tools, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    source = tmp_path / "source"
    texts = source / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    sounds = source / "usr/share/asterisk/sounds/en_US_f_Allison"
    texts.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress(b"; Core Asterisk Sounds in English\n\nbeep: [this is a simple beep tone]\n"
                                    b"digits/7: seven little dogs\nletters/at: at [@]\n"
                                    b"silence/1: (1 second of silence)\nvm-gone: not there.\n"))
    for name, text in (("digits/7", "seven little dogs"), ("letters/at", "at")):
        path = sounds / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="g722") as container:
            stream = container.add_stream("g722", rate=RATE, layout="mono")
            samples = (say(text)[0] * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate = RATE
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
        read = read_audio(path)
        assert abs(len(read) - samples.size) <= 640 and np.corrcoef(read[22:5022], samples[0, :5000])[0, 1] > 0.95
    aligner = FakeAligner(monkeypatch, tmp_path / "aligner")
    report = run("asterisk", tools, source, tmp_path / "out", aligner=aligner.folder)
    assert aligner.calls == ["seven little dogs", "at"]
    assert report["documents"] == 2 and report["dropped"] == {"unreadable audio": 1}


def test_stinystories(tools, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for sentence in SENTENCES:
        sound, timed = sound_bytes(tmp_path, sentence)
        rows.append(dict(audio=dict(bytes=sound, path="x.flac"), text=sentence, split_sentence=False, aligned_text=[
            dict(word=word.strip(".,!?").lower(), start_time=a, end_time=b) for word, a, b in timed]))
    rows.append(rows[0] | dict(aligned_text=[dict(word=None, start_time=None, end_time=0.1)]))
    rows[1]["aligned_text"], rows[2]["audio"], rows[3]["aligned_text"][1]["end_time"] = [], None, 5.0
    (tmp_path / "data").mkdir()
    for i in range(2):
        table = arrow.Table.from_pylist(rows[2 * i:2 * i + 2 + i])
        parquet.write_table(table, tmp_path / f"data/data-0000{i}-of-00002.parquet", row_group_size=1)
    report = run("stinystories", tools, tmp_path / "data", tmp_path / "out")
    record(tmp_path / "x.flac", SENTENCES[0])
    assert documents(tmp_path / "out") == expect(tools, (tmp_path / "x.flac", SENTENCES[0]))
    assert report["dropped"] == {"no word times": 1, "no audio": 1, "word times outside the audio": 1,
                                 "unreadable record": 1}
    with pytest.raises(SystemExit, match="no column document"):
        run("text", tools, tmp_path / "data", tmp_path / "no", field="document", kind="text")


def test_prose(tools, tmp_path):
    """The words of a book without its frame, in documents that end with sentences, as one of two speakers says them."""
    pytest.importorskip("espeakng_loader")
    body = """The _Whale_ sank -- so they said -- at 9 o'clock!

        "Is it gone?" he asked. No one knew;
        the sea was calm. And then?"""
    write(tmp_path / "books/whale.txt", "A free licence.", "*** START OF THIS PROJECT GUTENBERG EBOOK WHALE ***",
          body, "*** END OF THIS PROJECT GUTENBERG EBOOK WHALE ***", "Much more about the licence, " * 2)
    report = run("prose", tools, tmp_path / "books", tmp_path / "out", passage=6, speakers=[1, 4])
    texts = ["The Whale sank so they said at 9 o'clock!", '"Is it gone?" he asked. No one knew; the sea was calm.',
             "And then?"]
    assert report["documents"] == len(texts) and not report["dropped"]
    for text, (tokens, units) in zip(texts, documents(tmp_path / "out"), strict=True):
        said = [demo.record(text, speaker) for speaker in (1, 4)]
        assert (tokens, units) in [expected(tools, text, waveform, [end for _, end in times])
                                   for waveform, times in said]
    with pytest.raises(SystemExit, match="give numbers from 0 to 7"):
        run("prose", tools, tmp_path / "books", tmp_path / "no", speakers=[8])


def test_peoples_speech(tools, tmp_path):
    names = ["a/1.flac", "a/2.flac"]
    for name, sentence in zip(names, SENTENCES):
        record(tmp_path / "train/clean" / name, sentence)
    lists = dict(duration_ms=[1600, 1920, 9], label=[*SENTENCES[:2], "x"], name=[*names, "../../../secret.flac"])
    write(tmp_path / "train/clean.json", json.dumps(dict(identifier="d", training_data=lists)), '{"identifier": "e"}')
    report = run("peoples_speech", tools, tmp_path / "train", tmp_path / "out", kind="speech")
    units = expect(tools, *((tmp_path / "train/clean" / name, text) for name, text in zip(names, SENTENCES)))
    assert documents(tmp_path / "out") == [sum(words, []) for _, words in units]
    assert report["dropped"] == {"unreadable record": 2}
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [dict(id=name, audio=dict(bytes=(tmp_path / "train/clean" / name).read_bytes(), path=name), text=text,
                 duration_ms=1) for name, text in zip(names, SENTENCES)]
    (tmp_path / "hub").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "hub/train-00000-of-00001.parquet")
    run("peoples_speech", tools, tmp_path / "hub", tmp_path / "out2", kind="speech")
    assert documents(tmp_path / "out2") == documents(tmp_path / "out")


def test_manifest_with_every_kind_of_fault(tools, tmp_path, monkeypatch):
    """Each bad item is dropped under a name of its own, and the run goes on."""
    aligner = FakeAligner(monkeypatch, tmp_path / "aligner")
    timed = record(tmp_path / "in/good.flac", SENTENCES[0])
    for fault in FAULTS:
        spoil(tmp_path / f"in/{fault}.flac", fault)
    soundfile.write(tmp_path / "in/8k.wav", say(SENTENCES[0])[0][::2], 8000)
    soundfile.write(tmp_path / "in/short.wav", np.zeros(300), RATE)
    soundfile.write(tmp_path / "in/long.wav", np.zeros(RATE * 21), RATE)
    good = dict(audio="good.flac", text=SENTENCES[0], words=timed)
    late = [(word, a + 0.16, b + 0.16) for word, a, b in timed]
    last = dict(audio="good.flac", start=WORD, end=5 * WORD, text="had your dark suit.", words=timed[1:])
    records = {"fine": [good, good | dict(words=None), last, good | dict(audio="8k.wav", words=None)],
               "no transcript": [dict(audio="good.flac"), good | dict(text="  ")],
               "no audio": [dict(text="Hello", words=[["hello", 0, 1]])],
               "transcript does not match word times": [good | dict(text="Something else"),
                                                        good | dict(words=timed[:4])],
               "word times outside the audio": [good | dict(words=late)],
               "audio too short for its transcript": [good | dict(text="much " * 40, words=None)],
               "audio too short": [dict(audio="short.wav", text="a", words=[["a", 0, 0.01]])],
               "audio too long": [good | dict(audio="long.wav"), good | dict(start=0, end=99)],
               "span outside the audio": [good | dict(start=0.1, end=7)],
               "path outside the source": [good | dict(audio="../good.flac"), good | dict(audio="/etc/passwd")],
               "unreadable record": ["not json", "[]", good | dict(start="soon"), good | dict(words=[["a", 1]])],
               "text is not UTF-8": [good | dict(text="\ud800 she")]}
    for fault, reason in FAULTS.items():
        records.setdefault(reason, []).append(good | dict(audio=f"{fault}.flac"))
    lines = [r if isinstance(r, str) else json.dumps(r) for kind in records.values() for r in kind]
    (tmp_path / "in/manifest.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    report = run("manifest", tools, tmp_path / "in", tmp_path / "out", aligner=aligner.folder, max_seconds=20)
    wanted = {reason: len(items) for reason, items in records.items() if reason != "fine"}
    wanted["unreadable record"] += 1  # the line that is no UTF-8
    assert report["dropped"] == wanted
    assert report["documents"] == 4 and report["items"] == 4 + sum(wanted.values()) == len(lines) + 1
    assert len(dropped(tmp_path / "out")) == sum(wanted.values())
    assert all("\n" not in reason for reason in dropped(tmp_path / "out").values())
    path, found = tmp_path / "in/good.flac", documents(tmp_path / "out")
    whole = (path, SENTENCES[0])
    assert found[:3] == expect(tools, whole, whole, (path, last["text"], WORD, 5 * WORD)) and found[3][0] == found[0][0]
    assert aligner.calls.count(SENTENCES[0]) == 2  # what has times of its own is not aligned


def test_a_word_that_the_tokenizer_drops_whole(tools):
    """SmolLM's vocabulary lacks some bytes, but no word may be without tokens."""
    vocabulary = load_mel_units(str(tools / "units"))
    tokenizer = type("Lacking", (), dict(encode_words=lambda self, words: [[1] * (word != "\x06") for word in words]))()
    waveform, timed = say("a \x06 b")
    heard = common.Heard(len(waveform), None, vocabulary.encode([waveform])[0], [span[1:] for span in timed])
    with pytest.raises(ValueError, match="^word without tokens: "):
        common.spoken_document(common.Item("x", text="a \x06 b"), heard, common.Models(vocabulary, None, tokenizer))


def test_text_files(tools, tmp_path):
    texts = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES * 2)]
    write(tmp_path / "in/a/1.txt", texts[0])
    (tmp_path / "in/a/2.txt").write_bytes(b"caf\xe9")
    write(tmp_path / "in/b.jsonl", json.dumps(dict(text=texts[1])), '{"text": ""}', '{"text": 5}', '{"text"', "",
          json.dumps(dict(text=texts[2])))
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress(json.dumps(dict(text=texts[3])).encode()))
    packed = gzip.compress((json.dumps(dict(text=texts[4])) + "\n").encode() * 99)
    (tmp_path / "in/d.jsonl.gz").write_bytes(packed[:80])
    (tmp_path / "in/e.jsonl.gz").write_bytes(b"not gzip at all")
    report = run("text", tools, tmp_path / "in", tmp_path / "out")
    tokenizer = Tokenizer(tools / "tokenizer.json")
    found = documents(tmp_path / "out")
    assert found[:4] == [tokenizer.encode(text) for text in (texts[0] + "\n", *texts[1:4])]
    assert report["dropped"] == {"text is not UTF-8": 1, "empty document": 1, "unreadable record": 2,
                                 "unreadable file": 2}
    assert report["items"] == report["documents"] + 6
    assert report["tokens"] == {"text": sum(map(len, found)) + len(found)}


def test_compressed_and_columnar_text(tools, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES * 10)]
    (tmp_path / "in").mkdir()
    parquet.write_table(arrow.table({"id": range(30), "body": [*texts[:29], None]}), tmp_path / "in/a.parquet",
                        row_group_size=7)
    lines = "".join(json.dumps(dict(body=text)) + "\n" for text in texts[29:])
    (tmp_path / "in/b.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "in/c.parquet").write_bytes(b"PAR1 but not really")
    torn = bytearray((tmp_path / "in/a.parquet").read_bytes())
    torn[4:200] = bytes(196)
    (tmp_path / "in/d.parquet").write_bytes(torn)
    (tmp_path / "in/e.jsonl.zst").write_bytes(b"no zstandard frame")
    report = run("text", tools, tmp_path / "in", tmp_path / "out", field="body")
    assert documents(tmp_path / "out") == [Tokenizer(tools / "tokenizer.json").encode(text) for text in texts]
    assert report["dropped"] == {"empty document": 1, "unreadable file": 3}


# parts, shards, interruptions

@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tools):
    """A manifest of 300 short recordings, some bad, and what comes of it in one go: (source, out)."""
    source, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("whole") / "out"
    timed = [record(source / f"{i}.flac", sentence) for i, sentence in enumerate(SENTENCES)]
    write(source / "manifest.jsonl", *(json.dumps(dict(
        audio=f"{i % 5}.flac", text=SENTENCES[i % 4], words=timed[i % 4])) for i in range(300)))
    run("manifest", tools, source, out, part_tokens=900)
    return source, out


def contents(out):
    """{file: bytes} of all arrays and lists below a folder, and what part.json says but for times."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).rglob("*"))
             if path.suffix in (".npy", ".jsonl") or path.name == "meta.json"}
    for path in sorted(Path(out).rglob("part.json")):
        found[str(path.relative_to(out))] = json.loads(path.read_text()) | dict(seconds=None)
    return found


def test_parts(corpus, tools):
    """Parts are whole data sets of bounded size, together one sharded set, and add up."""
    source, out = corpus
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("*/part.json"))]
    report = json.loads((out / "report.json").read_text())
    assert len(parts) == report["parts"] == 3 and [part["last"] for part in parts] == [False] * 2 + [True]
    assert [part["first"] for part in parts] == [0, 128, 256] and parts[-1]["next"] == report["items"] == 300
    assert report["dropped"] and report["documents"] + sum(report["dropped"].values()) == 300
    hashes = Tokenizer(tools / "tokenizer.json").hash, load_units(str(tools / "units")).hash
    assert len(open_source("interleaved", [out], *hashes).shards) == 3
    assert sum(len(part.speech) for part in sets(out)) == report["tokens"]["speech"]
    assert not list(out.glob(".unfinished*"))


def test_workers_and_shards_change_nothing(corpus, tools, tmp_path):
    source, whole = corpus
    run("manifest", tools, source, tmp_path / "pool", part_tokens=900, workers=2)
    assert contents(tmp_path / "pool") == contents(whole)
    reports = [run("manifest", tools, source, tmp_path / "shards", shard=f"{i}/3") for i in (2, 0, 1)]
    assert [report["items"] for report in reports] == [100, 100, 100]
    alone = [documents_of_shard(tmp_path / "shards", i) for i in range(3)]
    kept = iter(documents(whole))
    in_order = [iter(shard) for shard in alone]
    lost = {int(name.partition(":")[2]) - 1 for name in dropped(whole)}
    assert all(next(in_order[i % 3]) == next(kept) for i in range(300) if i not in lost)
    assert dropped(tmp_path / "shards").keys() == dropped(whole).keys()
    assert (tmp_path / "shards/report-2-of-3.json").exists()


def documents_of_shard(out, shard):
    folder = out.parent / f"only-{shard}"
    for path in out.glob(f"shard-{shard}-of-*"):
        shutil.copytree(path, folder / path.name)
    return documents(folder)


@pytest.mark.parametrize("where", ["finish", "write_set", "before the rename", "after the rename", "report"])
@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_run_goes_on(corpus, tools, tmp_path, monkeypatch, where, calls):
    """Whatever call the process dies in, the same command then leaves what an undisturbed run leaves."""
    source, whole = corpus
    targets = {"finish": (common, "finish"), "write_set": (common, "write_set"), "report": (common, "report")}
    owner, name = targets.get(where, (os, "rename"))
    real, left = getattr(owner, name), [1 if where == "report" else calls]

    def dying(*args):
        left[0] -= 1
        if left[0]:
            return real(*args)
        if where == "after the rename":
            real(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dying)
        run("manifest", tools, source, tmp_path / "out", part_tokens=900)
    before = contents(tmp_path / "out")
    finished = len([name for name in before if name.endswith("part.json") and "unfinished" not in name])
    wanted = {"report": 3, "finish": calls // 2, "after the rename": calls}  # there are two blocks to a part
    assert finished == wanted.get(where, calls - 1)
    data_sets = len(list((tmp_path / "out").glob("*/meta.json")))
    assert data_sets == finished  # nothing half-made is in sight of open_source
    report = run("manifest", tools, source, tmp_path / "out", part_tokens=900)
    assert contents(tmp_path / "out") == contents(whole) and not list((tmp_path / "out").glob(".*"))
    known = json.loads((whole / "report.json").read_text())
    assert {k: v for k, v in report.items() if k not in ("seconds", "speeds")} == {
        k: v for k, v in known.items() if k not in ("seconds", "speeds")}


def test_a_killed_run_goes_on(tools, tmp_path):
    """The real thing: SIGKILL, in the midst of writing."""
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(text=f"{i} {SENTENCES[i % 4]}")) for i in range(5000)))
    options = dict(source=tmp_path / "in", out=tmp_path / "out", tokenizer=tools / "tokenizer.json", part_tokens=1000,
                   workers=1)
    command = [sys.executable, "-m", "corpora.text", *(f"--{key}={value}" for key, value in options.items())]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out/shard-0-of-1-00002").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "out").glob("*/part.json")))
    assert 3 <= done < 20 and not (tmp_path / "out/report.json").exists()
    run("text", tools, tmp_path / "in", tmp_path / "out", part_tokens=1000)
    run("text", tools, tmp_path / "in", tmp_path / "whole", part_tokens=1000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*/part.json"))) == 20


@pytest.mark.parametrize("change, named", [
    (dict(part_tokens=901), "part_tokens 900, now it is 901"), (dict(shard="0/2"), "shards 1, now it is 2"),
    (dict(kind="speech"), "kind 'paired', now it is 'speech'"), ("tokenizer", "tokenizer '"), ("units", "units '"),
    ("source", "files '")])
def test_a_changed_run_does_not_go_on(corpus, tools, tmp_path, change, named):
    source, out = corpus
    shutil.copytree(out, tmp_path / "out")
    options = change if isinstance(change, dict) else {}
    if change == "tokenizer":
        demo.train_tokenizer(["quite another text"] * 3, 290, tmp_path / "tokenizer.json")
        options = dict(tokenizer=tmp_path / "tokenizer.json")
    elif change == "units":
        noise = np.random.default_rng(1).normal(0, 0.1, 16000).astype(np.float32)
        save_mel_units(str(tmp_path / "units"), fit_mel_units([mel_frames(noise)], 9, 0))
        options = dict(units=tmp_path / "units")
    elif change == "source":
        shutil.copytree(source, tmp_path / "in")
        with open(tmp_path / "in/manifest.jsonl", "a") as file:
            file.write("{}\n")
    with pytest.raises(SystemExit, match=named):
        run("manifest", tools, tmp_path / "in" if change == "source" else source, tmp_path / "out",
            **dict(part_tokens=900) | options)
    assert contents(tmp_path / "out") == contents(out)


def test_a_missing_part_is_noticed(corpus, tools, tmp_path):
    shutil.copytree(corpus[1], tmp_path / "out")
    shutil.rmtree(tmp_path / "out/shard-0-of-1-00001")
    with pytest.raises(SystemExit, match="a part of shard 0 before its item 256 is missing"):
        run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)


@pytest.mark.parametrize("pool", [False, True])
def test_items_are_read_as_they_are_needed(pool):
    """However long the corpus: when a block is handed out, only a few more have been read."""
    read = [0]

    def endless():
        while True:
            read[0] += 1
            yield common.Bad(str(read[0]), ValueError("none: at all"))

    class Pool:
        def submit(self, function, *args):
            return type("Future", (), dict(result=lambda self: function(*args)))()
    stream = common.blocks(endless(), dict(kind="speech"), Pool() if pool else None)
    for number in range(1, 50):
        items, results, _, last = next(stream)
        assert len(items) == len(results) == 64 and not last
        assert read[0] <= (number + common.AHEAD + 1) * 64


def test_documents_are_not_collected(tools, tmp_path, monkeypatch):
    """A part takes documents one by one from finish(): a hundred parts are never in memory together."""
    texts = [SENTENCES[i % 4] for i in range(1024)]
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(text=text)) for text in texts))
    real, most = common.finish, [0]

    def counting(items, *args):
        finished = len(list((tmp_path / "out").glob("*/part.json")))
        most[0] = max(most[0], int(items[0].id.partition(":")[2]) - 1 - finished * 256)
        return real(items, *args)
    monkeypatch.setattr(common, "finish", counting)
    report = run("text", tools, tmp_path / "in", tmp_path / "out", part_tokens=1)
    assert report["parts"] == 4 and most[0] == 0  # a block is only finished when all before it are on disk


def test_units_from_a_model(corpus, tools, tmp_path, monkeypatch):
    """Units that a model makes come from the main process, a block at a time, and are the same then."""
    source, whole = corpus
    shutil.copytree(tools / "units", tmp_path / "units")
    about = json.loads((tmp_path / "units/units.json").read_text())
    (tmp_path / "units/units.json").write_text(json.dumps(about | dict(kind="hubert")))
    sizes, encode = [], MelUnits.encode
    monkeypatch.setattr(common, "load_units", lambda folder, device="cpu": load_mel_units(str(tools / "units")))
    monkeypatch.setattr(MelUnits, "encode", lambda self, waves: sizes.append(len(waves)) or encode(self, waves))
    run("manifest", tools, source, tmp_path / "out", part_tokens=900, units=tmp_path / "units")
    assert contents(tmp_path / "out") == contents(whole)
    assert len(sizes) == 5 and sum(sizes) >= len(documents(whole))


@pytest.mark.parametrize("options, message", [
    (dict(source="/nowhere"), "--source=/nowhere: there is no such file or folder"),
    (dict(tokenizer=""), "--tokenizer is missing: a paired set needs --source, --out, --units, --tokenizer"),
    (dict(tokenizer="/nowhere.json"), "--tokenizer=/nowhere.json: there is no such file"),
    (dict(units="tools"), "not a folder of units"), (dict(kind="video"), "this corpus gives paired, speech, text"),
    (dict(shard="3/3"), "--shard=3/3: write i/n"), (dict(shard="a"), "--shard=a: write i/n"),
    (dict(unit="x"), "no setting unit; did you mean units?"), (dict(source="empty"), "nothing of manifest found")])
def test_what_cannot_work_stops_at_once(corpus, tools, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    places = dict(tools=tools, empty=tmp_path / "empty")
    options = {key: places.get(value, value) for key, value in options.items()}
    with pytest.raises(SystemExit, match=message):
        run("manifest", tools, **dict(source=corpus[0], out=tmp_path / "out") | options)
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_one_good_item_says_so(tools, tmp_path):
    write(tmp_path / "in/manifest.jsonl", '{"text": "no sound"}', '{"text": "none either"}')
    for _ in range(2):  # the second time from the record of the first
        with pytest.raises(SystemExit, match="not one document from 2 items; dropped {'no word times': 2}"):
            run("manifest", tools, tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in2/manifest.jsonl", "")
    with pytest.raises(SystemExit, match="no items found"):
        run("manifest", tools, tmp_path / "in2", tmp_path / "out2")


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(5, 400))
@settings(max_examples=50, deadline=None)
def test_cut(start, length, longest):
    spans = files.cut(start, start + length, longest)
    assert spans[0][0] == start and spans[-1][1] == pytest.approx(start + length)
    assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(spans))
    assert all(b - a <= longest * (1 + 1e-9) for a, b in spans)
    assert len(spans) == 1 or len(spans) < length / longest + 1.01
