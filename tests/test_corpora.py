"""Sound files, and corpora/: each layout becomes the right data sets; bad items, shards and interruptions."""
import gzip
import io
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

from corpora import common, demo, files, parts
from data import open_source
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech.audio import read_audio
from speech.mel import MelUnits, fit_mel_units, load_mel_units, mel_frames, save_mel_units

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[speech]'")

RATE, WORD = 16000, 0.32  # Hz; seconds that each word takes in these tests
SENTENCES = ["She had your dark suit.", "It's the king, and he ran!", "A little dog sat down.", "Who knows?"]
SPHERE = """NIST_1A
   1024
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
    """A folder with a tokenizer.json and mel units."""
    folder = tmp_path_factory.mktemp("tools")
    demo.train_tokenizer(SENTENCES * 3, 300, folder / "tokenizer.json")
    frames = [mel_frames(say(sentence)[0]) for sentence in SENTENCES]
    save_mel_units(str(folder / "units"), fit_mel_units(frames, 12, 0))
    return folder


def say(text):
    """Return a waveform with one sound for each word, and the timed words."""
    rng, pieces, timed = np.random.default_rng(len(text)), [], []
    n = int(WORD * RATE)
    for i, word in enumerate(text.split()):
        pitch = 100 + zlib.crc32(word.encode()) % 900
        pieces.append(np.sign(np.sin(np.arange(n) * pitch * 6.2832 / RATE)) * np.linspace(0.1, 0.3, n))
        timed.append((word, i * WORD, (i + 1) * WORD))
    waveform = np.concatenate(pieces) + rng.normal(0, 0.003, len(pieces) * n)
    return waveform.astype(np.float32), timed


def record(path, text, **options):
    """Write what say() returns to a sound file, SPHERE if it is a .wav or .sph. Return the timed words."""
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
    """Write timed words as a TextGrid in Praat's short format, with a pause at the end."""
    end = timed[-1][2] + 0.1
    intervals = [f'{a}\n{b}\n"{word.lower()}"' for word, a, b in timed]
    write(path, 'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", f"{end}", "<exists>", "1",
          '"IntervalTier"', '"words"', "0", f"{end}", f"{len(timed) + 1}", *intervals, f'{timed[-1][2]}\n{end}\n""')


def run(name, tools, source, out, **options):
    """Run the command line of a corpus in this process. Return the report."""
    given = dict(source=source, out=out, workers=0, units=tools / "units", tokenizer=tools / "tokenizer.json") | options
    before, sys.argv = sys.argv, [name, *(f"--{key}={value}" for key, value in given.items())]
    try:
        runpy.run_module(f"corpora.{name}", run_name="__main__")
    finally:
        sys.argv = before
    reports = sorted(Path(out).glob("report*.json"), key=os.path.getmtime)
    return json.loads(reports[-1].read_text())


def check(name, tools, tmp_path, wanted, reasons, source=".", **options):
    """Run a corpus, and check its documents and what it drops. Return the report."""
    report = run(name, tools, tmp_path / source, tmp_path / "out", **options)
    assert documents(tmp_path / "out") == wanted
    assert report["dropped"] == reasons
    return report


def sets(out):
    """Open the parts in a folder in order, each checked in full."""
    return [datasets.open_set(path.parent, full=True) for path in sorted(Path(out).glob("*/meta.json"))]


def documents(out):
    """Return all documents without EOS: (ids of its words, units of its words) if paired, otherwise its ids."""
    found = []
    for part in sets(out):
        for i in range(part.meta["documents"]):
            if part.meta["kind"] != "paired":
                stream = part.text if part.meta["kind"] == "text" else part.speech
                found.append(stream[part.documents[i]:part.documents[i + 1] - 1].tolist())
                continue
            text, units, text_words, speech_words = part.document(i)
            words = [text[a:b].tolist() for a, b in itertools.pairwise(text_words)]
            spoken = [units[a:b].tolist() for a, b in itertools.pairwise(speech_words)]
            found.append((words[:-1], spoken[:-1]))
    return found


def dropped(out):
    lines = [line for path in sorted(Path(out).glob("*/dropped.jsonl")) for line in path.read_text().splitlines()]
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}


def expected(tools, text, waveform, ends):
    """Work out a paired document frame by frame: a unit belongs to the word of its last frame."""
    ids, starts = load_mel_units(str(tools / "units")).encode([waveform])[0]
    n_frames, words = len(waveform) // 640, text.split()
    spoken = [[] for _ in words]
    for unit, last in zip(ids.tolist(), [*(starts[1:] - 1), n_frames - 1]):
        owner = next((i for i, end in enumerate(ends) if last < np.floor(25 * end + 1e-6)), len(words) - 1)
        spoken[owner].append(unit)
    return Tokenizer(tools / "tokenizer.json").encode_words(words), spoken


def expect(tools, *recordings):
    """Paired documents of (path, text) or (path, text, start, end) that record() made."""
    found = []
    for path, text, *span in recordings:
        waveform = soundfile.read(path, dtype="float32")[0]
        if span:
            waveform = waveform[round(span[0] * RATE):round(span[1] * RATE)]
        found.append(expected(tools, text, waveform, WORD * np.arange(1, len(text.split()) + 1)))
    return found


def units_of(documents):
    """The units of paired documents, no longer cut into words."""
    return [sum(spoken, []) for _, spoken in documents]


def write_parquet(path, rows, **options):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)


@pytest.fixture
def aligner(monkeypatch, tmp_path):
    """A stand-in for the aligner: each word takes WORD seconds. It fails if the audio is too short for that."""
    def align_one(waveform, text):
        n = len(text.split())
        if n * WORD > len(waveform) / RATE + 0.01:
            return ValueError(f"audio too short for its transcript: {n} words")
        return [(i * WORD, (i + 1) * WORD) for i in range(n)]

    calls = []

    def align(waveforms, texts, aligner):
        calls.extend(texts)
        return list(map(align_one, waveforms, texts))

    monkeypatch.setattr(common, "load_aligner", lambda folder, device: "aligner")
    monkeypatch.setattr(common, "align", align)
    return calls


# sound files

@pytest.mark.parametrize("suffix, tolerance", [("wav", 3e-5), ("flac", 3e-5), ("ogg", 0.06), ("mp3", 0.06)])
def test_sound_files_of_every_format_can_be_read_in_spans(tmp_path, suffix, tolerance):
    waveform, path = say(SENTENCES[0])[0], tmp_path / f"a.{suffix}"
    soundfile.write(path, waveform, RATE)
    read = read_audio(str(path))
    assert read.dtype == np.float32 and read.shape == waveform.shape
    assert np.sqrt(np.mean((read - waveform) ** 2)) < tolerance
    assert np.array_equal(read_audio(path.read_bytes(), 0.5), read[8000:])
    assert read_audio(str(path), 1.0, len(waveform) / RATE + 0.09).shape == (len(waveform) - 16000,)


@given(start=st.floats(0, 1.5), length=st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_span_is_a_slice(tmp_path_factory, start, length):
    path = tmp_path_factory.getbasetemp() / "span.flac"
    if not path.exists():
        record(path, SENTENCES[0])
    whole, end = read_audio(str(path)), min(start + length, 1.6)
    assert np.array_equal(read_audio(str(path), start, end), whole[round(start * RATE):round(end * RATE)])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_and_channels_averaged(tmp_path, rate):
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * t) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], 1), rate)
    read = read_audio(str(tmp_path / "a.wav"), 0.2, 0.7)
    want = np.sin(2 * np.pi * 440 * (0.2 + np.arange(8000) / RATE)) * 0.25
    assert len(read) in (8000, 8001) and np.abs(read[400:7600] - want[400:7600]).max() < 2e-3


def test_sphere(tmp_path):
    record(tmp_path / "SA1.WAV", SENTENCES[0])
    read = read_audio(str(tmp_path / "SA1.WAV"))
    assert np.abs(read - say(SENTENCES[0])[0]).max() < 1e-4
    assert np.array_equal(read_audio(str(tmp_path / "SA1.WAV"), 0.1, 0.2), read[1600:3200])


def sound(samples, rate=RATE, **options):
    """Return the bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


FLAC, WAV = (sound(say(SENTENCES[0])[0], format=format) for format in ("FLAC", "WAV"))
SHORTEN = SPHERE.format(n=9, more="sample_coding -s26 pcm,embedded-shorten-v2.00\n")
UNUSABLE = {  # content of a sound file, and the reason why it cannot be used
    "missing": (None, "unreadable audio"),
    "truncated": (FLAC[:9000], "unreadable audio"),
    "not audio": (b"this is no sound file\n" * 50, "unreadable audio"),
    "one sample a second": (sound(np.zeros(9), 1, format="WAV"), "unreadable audio"),
    "half a wav": (WAV[:20000], "unreadable audio: .* breaks off"),  # libsndfile reads it without a warning
    "half a SPHERE": (SPHERE.format(n=20000, more="").encode().ljust(20000), "unreadable audio: .* breaks off"),
    "shorten": (SHORTEN.encode().ljust(1024), "unreadable audio: .*convert it: sph2pipe"),
    "zero bytes": (b"", "empty audio"),
    "no samples": (sound(np.zeros(0), format="WAV"), "empty audio"),
    "NaN": (sound(np.array([0.1, np.nan] * 8000), format="WAV", subtype="FLOAT"), "audio is not finite"),
    "36 bits of length": (FLAC[:21] + b"\xff" * 5 + FLAC[26:], "audio too long"),
}


def spoil(path, fault):
    if UNUSABLE[fault][0] is not None:
        path.write_bytes(UNUSABLE[fault][0])


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_audio_has_a_reason(tmp_path, fault):
    spoil(tmp_path / "a.flac", fault)
    with pytest.raises(ValueError, match=f"^{UNUSABLE[fault][1]}") as caught:
        read_audio(str(tmp_path / "a.flac"))
    assert "a.flac" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("span", [(-1, None), (5, None), (0, 5), (1, 1), (1, 0.5)])
def test_spans_outside_are_refused(tmp_path, span):
    record(tmp_path / "a.flac", SENTENCES[0])
    with pytest.raises(ValueError, match="^span outside the audio: "):
        read_audio(str(tmp_path / "a.flac"), *span)


# files

def test_no_name_leads_out_of_the_source(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/x.sph").write_bytes(b"secret")
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    (tmp_path / "in/x.sph").symlink_to("../out/x.sph")
    (tmp_path / "in/y.sph").symlink_to("z.sph")
    assert files.inside(tmp_path / "in", "a/../y.sph") == str(tmp_path / "in/y.sph")
    for name in ("x.sph", "link/x.sph", "../out/x.sph", "a/../../out/x.sph", str(tmp_path / "out/x.sph")):
        with pytest.raises(ValueError, match="^path outside the source: "):
            files.inside(tmp_path / "in", name)


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(5, 400))
@settings(max_examples=50, deadline=None)
def test_cut_gives_as_few_equal_pieces_as_possible(start, length, longest):
    spans = files.cut(start, start + length, longest)
    assert spans[0][0] == start and spans[-1][1] == pytest.approx(start + length)
    assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(spans))
    assert all(b - a <= longest * (1 + 1e-9) for a, b in spans)
    assert len(spans) == 1 or len(spans) < length / longest + 1.01


# corpora

def test_librispeech(tools, tmp_path):
    upper = [sentence.upper().translate(str.maketrans("", "", ".,!?")) for sentence in SENTENCES]
    chapter, other = tmp_path / "LibriSpeech/dev-clean/84/121123", tmp_path / "LibriSpeech/dev-clean/84/9"
    aligned = tmp_path / "alignments/dev-clean/84"
    names = [f"84-121123-000{i}" for i in range(3)]
    write(chapter / "84-121123.trans.txt", *(f"{name} {text}" for name, text in zip(names, upper)))
    for name, text in zip(names, upper):
        timed = record(chapter / f"{name}.flac", text)
        textgrid(aligned / f"121123/{name}.TextGrid", timed)
    (aligned / f"121123/{names[2]}.TextGrid").unlink()
    write(other / "84-9.trans.txt", f"84-9-0000 {upper[3]}")
    ends = [end for _, _, end in record(other / "84-9-0000.flac", upper[3])]
    write(aligned / "9/84-9.alignment.txt", f'84-9-0000 ",{upper[3].replace(" ", ",")}," "0,{ends[0]},{ends[1]},9.9"')
    spoken = expect(tools, *((chapter / f"{names[i]}.flac", upper[i]) for i in range(2)),
                    (other / "84-9-0000.flac", upper[3]))
    report = check("librispeech", tools, tmp_path, spoken, {"no word times": 1}, "LibriSpeech",
                   alignments=tmp_path / "alignments")
    assert (report["items"], report["documents"], report["words"]) == (4, 3, 13)
    assert list(dropped(tmp_path / "out")) == [names[2]]
    assert report["hours"] == pytest.approx(13 * WORD / 3600)
    assert report["tokens"]["text"] == sum(len(part.text) for part in sets(tmp_path / "out"))
    assert run("librispeech", tools, tmp_path / "LibriSpeech", tmp_path / "speech", kind="speech")["documents"] == 4
    assert units_of(spoken) == [documents(tmp_path / "speech")[i] for i in (0, 1, 3)]


def test_librilight(tools, tmp_path):
    path = tmp_path / "small/100/sea_fairies/01_baum.flac"
    record(path, " ".join(["one two three four five"] * 6))  # 9.6 s
    active = [[0.0, 1.0], [1.5, 2.9], [4.0, 9.6]]
    write(path.with_suffix(".json"), json.dumps(dict(speaker="100", voice_activity=active)))
    second = path.with_name("02_baum.flac")
    record(second, "one two three four five six")  # 1.92 s without voice activity
    record(path.with_name("03_baum.flac"), "one")
    write(path.with_name("03_baum.json"), "{}")
    spans = [(path, "x", 0, 2.9), (path, "x", 4, 4 + 5.6 / 2), (path, "x", 4 + 5.6 / 2, 9.6), (second, "x")]
    wanted = units_of(expect(tools, *spans))
    check("librilight", tools, tmp_path, wanted, {"unreadable voice activity": 1}, segment=3)


def test_libriheavy(tools, tmp_path, aligner):
    path = tmp_path / "light/small/100/sea/01_baum.flac"
    record(path, " ".join(SENTENCES))  # 5, 6, 5 and 2 words

    def cut(first, n, text, recording="small/100/sea/01_baum"):
        supervision = dict(custom=dict(texts=[text, text.upper()]))
        return dict(id=f"{recording}_{first}", start=first * WORD, duration=n * WORD, supervisions=[supervision],
                    recording=dict(id=recording))
    cuts = [cut(0, 5, SENTENCES[0]), cut(5, 6, SENTENCES[1]), cut(11, 5, SENTENCES[2] + " and much more text"),
            cut(0, 2, "no such", "small/7/none"), cut(0, 2, "Bad path", "../../etc/x"), dict(id="odd")]
    source = tmp_path / "libriheavy_cuts_small.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))
    wanted = expect(tools, (path, SENTENCES[0], 0, 5 * WORD), (path, SENTENCES[1], 5 * WORD, 11 * WORD))
    reasons = {"audio too short for its transcript": 1, "unreadable audio": 1, "unreadable record": 2}
    check("libriheavy", tools, tmp_path, wanted, reasons, source, audio=tmp_path / "light", aligner="mms")


def test_swc(tools, tmp_path):
    article = tmp_path / "english/Anarchism"
    record(article / "audio1.ogg", SENTENCES[0])
    record(article / "audio2.ogg", " ".join(SENTENCES[1:3]))

    def sentence(text, first, timed=True):
        tokens = []
        for at, word in enumerate(text.split(), first):
            time = f'start="{at * 320}" end="{at * 320 + 320}"' if timed or at > first else ""
            tokens.append(f'<t>{word}<n pronunciation="{word.lower()}" {time}/></t>')
        return f"<s>{' '.join(tokens)}</s>"
    offsets = [f'<prop key="DC.source.audio.offset" value="{value}"/>' for value in (0, 5 * WORD)]
    second = f"{sentence(SENTENCES[1], 5)} {sentence(SENTENCES[2], 11)} {sentence(SENTENCES[3], 16, False)}"
    write(article / "aligned.swc", f"<article><meta>{''.join(offsets)}</meta><d><p>{sentence(SENTENCES[0], 0)}</p>",
          f"<p>{second}</p></d></article>")
    write(tmp_path / "english/Broken/aligned.swc", "<article><d>")
    wanted = expect(tools, (article / "audio1.ogg", SENTENCES[0]), (article / "audio2.ogg", " ".join(SENTENCES[1:3])))
    assert check("swc", tools, tmp_path, wanted, {"no word times": 1, "unreadable file": 1}, "english")["items"] == 4
    assert run("swc", tools, tmp_path / "english", tmp_path / "speech", kind="speech")["documents"] == 2


def test_tedlium(tools, tmp_path, aligner):
    path = tmp_path / "legacy/train/sph/AlGore_2009.sph"
    record(path, "it's the king and he ran down")
    segments = [(0, 2, "<o,f0,male>", "it 's the"), (2, 4, "<o,f0,male>", "king <unk>"),
                (4, 5, "<F0_M>", "ignore_time_segment_in_scoring"), (5, 7, "<o,f0>", "ran(2) {NOISE} down <sil>")]
    lines = [f"AlGore_2009 1 AlGore {a * WORD:.2f} {b * WORD:.2f} {label} {text}" for a, b, label, text in segments]
    write(tmp_path / "legacy/train/stm/AlGore_2009.stm", *lines, "AlGore_2009 1 x", "../x 1 x 0 1 <o> a")
    wanted = expect(tools, (path, "it's the", 0, 2 * WORD), (path, "ran down", 5 * WORD, 7 * WORD))
    reasons = {"unknown word in transcript": 1, "unreadable record": 2}
    check("tedlium", tools, tmp_path, wanted, reasons, "legacy", aligner="mms")
    assert run("tedlium", tools, tmp_path / "legacy", tmp_path / "speech", kind="speech")["documents"] == 3


def test_timit(tools, tmp_path):
    for folder, names in (("TRAIN/DR1/FCJF0", ("SA1", "SI648", "SX37")), ("test/dr2/mabc0", ("sx1",))):
        for name, sentence in zip(names, SENTENCES):
            case = str.upper if name.isupper() else str.lower
            path = tmp_path / folder / name
            timed = record(path.with_suffix(case(".wav")), sentence)
            times = [f"{round(a * RATE)} {round(b * RATE)} {word.strip('.,!?').lower()}" for word, a, b in timed]
            write(path.with_suffix(case(".txt")), f"0 {round(timed[-1][2] * RATE)} {sentence}")
            write(path.with_suffix(case(".wrd")), *times)
    (tmp_path / "TRAIN/DR1/FCJF0/SX37.TXT").unlink()
    wanted = expect(tools, (tmp_path / "TRAIN/DR1/FCJF0/SI648.WAV", SENTENCES[1]),
                    (tmp_path / "test/dr2/mabc0/sx1.wav", SENTENCES[0]))
    check("timit", tools, tmp_path, wanted, {"missing file": 1})
    assert run("timit", tools, tmp_path, tmp_path / "sa", sa="true")["documents"] == 3


def test_voxpopuli(tools, tmp_path, aligner):
    folder = tmp_path / "transcribed_data/en"
    names = ["20180117-0900-PLENARY-15-en_20180117-22:00:30_3", "20090112-0900-PLENARY-1-en_1"]
    write(folder / "asr_train.tsv", "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender",
          f"{names[0]}\t{SENTENCES[0]}\tshe had\t1\ttrain\tfemale", f"{names[1]}\t\twho knows\t2\ttrain\tmale", "torn")
    paths = [folder / "2018" / f"{names[0]}.ogg", folder / "2009" / f"{names[1]}.ogg"]
    record(paths[0], SENTENCES[0])
    record(paths[1], "who knows")
    wanted = expect(tools, (paths[0], SENTENCES[0]), (paths[1], "who knows"))
    check("voxpopuli", tools, tmp_path, wanted, {"unreadable record": 1}, aligner="mms")
    record(tmp_path / "raw_audios/en/2019/2019_en.ogg", " ".join(SENTENCES))  # 5.76 s
    assert run("voxpopuli", tools, tmp_path, tmp_path / "raw", kind="speech", subset="raw", segment=2)["documents"] == 3


def test_asterisk(tools, tmp_path, aligner):
    av = pytest.importorskip("av")
    texts = tmp_path / "in/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    path = tmp_path / "in/usr/share/asterisk/sounds/en_US_f_Allison/digits/7.g722"
    for file in (texts, path):
        file.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress(b"; Core Asterisk Sounds in English\n\nbeep: [this is a simple beep tone]\n"
                                    b"digits/7: seven little dogs [@]\nvm-gone: not there.\n"))
    samples = (say("seven little dogs")[0] * 32767).astype(np.int16)[None]
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    read = read_audio(path)
    assert abs(len(read) - samples.size) <= 640 and np.corrcoef(read[22:5022], samples[0, :5000])[0, 1] > 0.95
    report = run("asterisk", tools, tmp_path / "in", tmp_path / "out", aligner="pocketsphinx")
    assert aligner == ["seven little dogs"]
    assert report["documents"] == 1 and report["dropped"] == {"unreadable audio": 1}


def test_stinystories(tools, tmp_path):
    rows = []
    for sentence in SENTENCES:
        timed = record(tmp_path / "x.flac", sentence)
        words = [dict(word=word.strip(".,!?").lower(), start_time=a, end_time=b) for word, a, b in timed]
        sound = dict(bytes=(tmp_path / "x.flac").read_bytes(), path="x.flac")
        rows.append(dict(audio=sound, text=sentence, split_sentence=False, aligned_text=words))
    rows.append(rows[0] | dict(aligned_text=[dict(word=None, start_time=None, end_time=0.1)]))
    rows.append(rows[0] | dict(aligned_text=[dict(word="she", start_time=0.0, end_time=float("nan"))]))
    rows[1]["aligned_text"], rows[2]["audio"], rows[3]["aligned_text"][1]["end_time"] = [], None, 5.0
    write_parquet(tmp_path / "data/data-00000-of-00002.parquet", rows[:2], row_group_size=1)
    write_parquet(tmp_path / "data/data-00001-of-00002.parquet", rows[2:])
    record(tmp_path / "x.flac", SENTENCES[0])
    reasons = {"no word times": 1, "no audio": 1, "word times outside the audio": 1, "unreadable record": 2}
    check("stinystories", tools, tmp_path, expect(tools, (tmp_path / "x.flac", SENTENCES[0])), reasons, "data")


def test_prose(tools, tmp_path):
    """The text of a book without Gutenberg's frame, in documents that end with sentences, in one of two voices."""
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
    for text, found in zip(texts, documents(tmp_path / "out"), strict=True):
        wanted = []
        for speaker in (1, 4):
            waveform, times = demo.record(text, speaker)
            wanted.append(expected(tools, text, waveform, [end for _, end in times]))
        assert found in wanted


def test_both_layouts_of_peoples_speech(tools, tmp_path):
    names, rows = ["a/1.flac", "a/2.flac"], []
    for name, sentence in zip(names, SENTENCES):
        path = tmp_path / "train/clean" / name
        record(path, sentence)
        rows.append(dict(id=name, audio=dict(bytes=path.read_bytes(), path=name), text=sentence, duration_ms=1))
    lists = dict(duration_ms=[1600, 1920, 9], label=[*SENTENCES[:2], "x"], name=[*names, "../../../secret.flac"])
    write(tmp_path / "train/clean.json", json.dumps(dict(identifier="d", training_data=lists)), '{"identifier": "e"}')
    wanted = units_of(expect(tools, *((tmp_path / "train/clean" / name, text) for name, text in zip(names, SENTENCES))))
    check("peoples_speech", tools, tmp_path, wanted, {"unreadable record": 2}, "train", kind="speech")
    write_parquet(tmp_path / "hub/train-00000-of-00001.parquet", rows)
    run("peoples_speech", tools, tmp_path / "hub", tmp_path / "out2", kind="speech")
    assert documents(tmp_path / "out2") == wanted


def test_text_of_every_format(tools, tmp_path):
    texts = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES * 11)]
    write(tmp_path / "in/a/1.txt", texts[0])
    (tmp_path / "in/a/2.txt").write_bytes(b"caf\xe9")
    write(tmp_path / "in/b.jsonl", json.dumps(dict(text=texts[1])), '{"text": ""}', '{"text": 5}', '{"text"', "",
          json.dumps(dict(text=texts[2])))
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress(json.dumps(dict(text=texts[3])).encode()))
    (tmp_path / "in/d.jsonl.gz").write_bytes(b"not gzip at all")
    rows = [dict(id=i, text=text) for i, text in enumerate([*texts[4:33], None])]
    write_parquet(tmp_path / "in/e.parquet", rows, row_group_size=7)
    torn = (tmp_path / "in/e.parquet").read_bytes()
    (tmp_path / "in/f.parquet").write_bytes(torn[:4] + bytes(196) + torn[200:])
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in texts[33:])
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "in/g.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "in/h.jsonl.zst").write_bytes(b"no zstandard frame")
    wanted = list(map(Tokenizer(tools / "tokenizer.json").encode, [texts[0] + "\n", *texts[1:]]))
    reasons = {"text is not UTF-8": 1, "empty document": 2, "unreadable record": 2, "unreadable file": 3}
    report = check("text", tools, tmp_path, wanted, reasons, "in")
    assert report["items"] == report["documents"] + 8
    assert report["tokens"] == {"text": sum(map(len, wanted)) + len(wanted)}


def test_each_bad_item_is_dropped_with_its_reason(tools, tmp_path, aligner):
    timed = record(tmp_path / "in/good.flac", SENTENCES[0])
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
               "audio too long": [good | dict(audio="long.wav"), good | dict(audio="long.wav", start=0, end=20.5)],
               "span outside the audio": [good | dict(start=0.1, end=7)],
               "unreadable record": ["not json", "[]", good | dict(start="soon"), good | dict(words=[["a", 1]]),
                                     good | dict(audio="../good.flac"), good | dict(audio=7), '{"text": "\xff"}'],
               "unexpected fault": [good | dict(text=["She"])],
               "text is not UTF-8": [good | dict(text="\ud800 she")]}
    for fault, (_, reason) in UNUSABLE.items():
        spoil(tmp_path / f"in/{fault}.flac", fault)
        records.setdefault(reason.partition(":")[0], []).append(good | dict(audio=f"{fault}.flac"))
    lines = [r if isinstance(r, str) else json.dumps(r) for kind in records.values() for r in kind]
    (tmp_path / "in/manifest.jsonl").write_text("\n".join(lines), encoding="latin-1")
    report = run("manifest", tools, tmp_path / "in", tmp_path / "out", aligner="mms", max_seconds=20)
    wanted = {reason: len(items) for reason, items in records.items() if reason != "fine"}
    assert report["dropped"] == wanted and report["items"] == report["documents"] + sum(wanted.values()) == len(lines)
    assert len(dropped(tmp_path / "out")) == sum(wanted.values())
    assert all("\n" not in reason for reason in dropped(tmp_path / "out").values())
    whole, found = (tmp_path / "in/good.flac", SENTENCES[0]), documents(tmp_path / "out")
    assert found[:3] == expect(tools, whole, whole, (whole[0], last["text"], WORD, 5 * WORD))
    assert found[3][0] == found[0][0] and len(found) == 4
    assert aligner.count(SENTENCES[0]) == 2  # items with word times do not go to the aligner


def test_a_word_without_tokens_is_refused(tools):
    """SmolLM's vocabulary lacks some bytes, and a written word must not be empty."""
    vocabulary = load_mel_units(str(tools / "units"))
    tokenizer = type("Lacking", (), dict(encode_words=lambda self, words: [[1] * (word != "\x06") for word in words]))()
    waveform, timed = say("a \x06 b")
    heard = common.Heard(common.Item("x", text="a \x06 b"), len(waveform), None, vocabulary.encode([waveform])[0],
                         [span[1:] for span in timed])
    with pytest.raises(ValueError, match="^word without tokens: "):
        common.spoken_document(heard, common.Models(vocabulary, None, tokenizer))


# parts, shards, interruptions

@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tools):
    """(a manifest of 300 short recordings, some of them bad; what a run without interruptions makes of it)."""
    source, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("whole") / "out"
    timed = [record(source / f"{i}.flac", sentence) for i, sentence in enumerate(SENTENCES)]
    records = [dict(audio=f"{i % 5}.flac", text=SENTENCES[i % 4], words=timed[i % 4]) for i in range(300)]
    write(source / "manifest.jsonl", *map(json.dumps, records))
    run("manifest", tools, source, out, part_tokens=900)
    return source, out


def contents(out):
    """{file: content} of a folder, without the times that parts took."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if path.name == "part.json":
            found[name] = json.loads(path.read_text()) | dict(seconds=None)
        elif path.suffix in (".npy", ".jsonl") or path.name == "meta.json":
            found[name] = path.read_bytes()
    return found


def test_parts_are_one_sharded_set_and_their_counts_add_up(corpus, tools):
    out = corpus[1]
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*/part.json"))]
    report = json.loads((out / "report.json").read_text())
    assert len(records) == report["parts"] == 3 and [record["last"] for record in records] == [False, False, True]
    assert [record["first"] for record in records] == [0, 128, 256]
    assert records[-1]["next"] == report["items"] == 300
    assert report["dropped"] and report["documents"] + sum(report["dropped"].values()) == 300
    hashes = Tokenizer(tools / "tokenizer.json").hash, load_mel_units(str(tools / "units")).hash
    assert len(open_source("interleaved", [out], *hashes).shards) == 3
    assert sum(len(part.speech) for part in sets(out)) == report["tokens"]["speech"]


def test_the_number_of_workers_changes_nothing(corpus, tools, tmp_path):
    run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900, workers=2)
    assert contents(tmp_path / "out") == contents(corpus[1])


def test_shards_together_hold_what_one_run_holds(corpus, tools, tmp_path):
    source, whole = corpus
    shards = []
    for i in (2, 0, 1, 2):
        report = run("manifest", tools, source, tmp_path / "out", part_tokens=300, shard=f"{i}/3")
        assert report["items"] == 100 and report["parts"] == 2
        if i == 0:
            shutil.rmtree(tmp_path / "out/shard-2-of-3-00001")  # so that shard 2 has to go on
    for i in range(3):
        for path in (tmp_path / "out").glob(f"shard-{i}-of-3-*"):
            shutil.copytree(path, tmp_path / f"only-{i}" / path.name)
        shards.append(iter(documents(tmp_path / f"only-{i}")))
    bad = {int(name.partition(":")[2]) - 1 for name in dropped(whole)}
    assert [next(shards[i % 3]) for i in range(300) if i not in bad] == documents(whole)
    assert dropped(tmp_path / "out").keys() == dropped(whole).keys()


@pytest.mark.parametrize("where, calls, finished", [
    ("finish", 1, 0), ("finish", 4, 1), ("write_set", 3, 2), ("before rename", 1, 0), ("after rename", 3, 3),
    ("write_report", 1, 3)])
def test_an_interrupted_run_goes_on(corpus, tools, tmp_path, monkeypatch, where, calls, finished):
    """Whichever call a run dies in, the same command then leaves what an undisturbed run leaves."""
    source, whole = corpus
    owner = {"write_set": parts, "finish": common, "write_report": common}.get(where, os)
    name = where.split()[-1]
    real, count = getattr(owner, name), itertools.count(1)

    def dying(*args):
        if next(count) < calls:
            return real(*args)
        if where == "after rename":
            real(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dying)
        run("manifest", tools, source, tmp_path / "out", part_tokens=900)
    assert len(list((tmp_path / "out").glob("*/part.json"))) == finished
    assert len(list((tmp_path / "out").glob("*/meta.json"))) == finished  # open_source sees nothing unfinished
    report = run("manifest", tools, source, tmp_path / "out", part_tokens=900)
    assert contents(tmp_path / "out") == contents(whole) and not list((tmp_path / "out").glob(".*"))
    assert report | dict(seconds=0) == json.loads((whole / "report.json").read_text()) | dict(seconds=0)


def test_a_killed_run_goes_on(tools, tmp_path):
    """With a real SIGKILL in the midst of writing."""
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(text=f"{i} {SENTENCES[i % 4]}")) for i in range(5000)))
    command = [sys.executable, "-m", "corpora.text", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}",
               f"--tokenizer={tools / 'tokenizer.json'}", "--part_tokens=1000", "--workers=1"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out/shard-0-of-1-00002").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "out").glob("*/part.json")))
    assert 3 <= done < 20 and not (tmp_path / "out/report.json").exists()
    run("text", tools, tmp_path / "in", tmp_path / "out", part_tokens=1000)
    assert run("text", tools, tmp_path / "in", tmp_path / "whole", part_tokens=1000)["parts"] == 20
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("key", ["corpus", "kind", "files", "shards", "block", "part_tokens", "max_seconds",
                                 "tokenizer", "units", "aligner"])
def test_other_settings_are_refused_in_the_same_folder(corpus, tools, tmp_path, key):
    shutil.copytree(corpus[1], tmp_path / "out")
    path = tmp_path / "out/shard-0-of-1-00001/part.json"
    record = json.loads(path.read_text())
    record["identity"][key] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"shard-0-of-1-00001: was made with {key} 'other', now it is "):
        run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)


def test_a_listing_has_another_hash_if_a_file_is_longer_or_has_another_name(tmp_path):
    hashes = []
    for name, text in (("a", "1"), ("a", "12"), ("b", "1"), ("a", "2")):
        write(tmp_path / name, text)
        hashes.append(common.listing_hash(tmp_path, [tmp_path / name]))
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_a_missing_part_is_noticed(corpus, tools, tmp_path):
    shutil.copytree(corpus[1], tmp_path / "out")
    shutil.rmtree(tmp_path / "out/shard-0-of-1-00001")
    with pytest.raises(SystemExit, match="shard-0-of-1-00002: the part before it is missing"):
        run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)


def test_items_are_read_only_when_they_are_needed():
    """Memory does not grow with the corpus: only a few blocks are read ahead."""
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield common.Bad(str(i), ValueError("none: at all"))
    with common.ThreadPoolExecutor(1) as pool:
        stream = common.make_blocks(endless(), dict(kind="speech"), None, pool)
        for number in range(1, 20):
            results, _, is_last = next(stream)
            assert len(results) == 64 and not is_last
            assert len(read) <= (number + common.AHEAD + 1) * 64


def test_units_of_a_model_are_made_in_the_main_process_block_by_block(corpus, tools, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("name, options, message", [
    ("manifest", dict(source="/nowhere"), "--source=/nowhere: give an existing file or folder"),
    ("manifest", dict(tokenizer=""), "--tokenizer=: give an existing file or folder; a paired set needs it"),
    ("manifest", dict(out=""), "--out is missing"),
    ("manifest", dict(units="tools"), "not a whole unit vocabulary"),
    ("manifest", dict(aligner="tools"), "not a Wav2Vec2ForCTC"),
    ("manifest", dict(kind="video"), "this corpus gives paired, speech, text"),
    ("manifest", dict(shard="3/3"), "--shard=3/3: write i/n"), ("manifest", dict(shard="a"), "--shard=a: write i/n"),
    ("manifest", dict(unit="x"), "no setting unit; did you mean units?"),
    ("manifest", dict(source="empty"), "nothing of manifest found"),
    ("librilight", dict(kind="paired"), "this corpus gives speech"), ("libriheavy", {}, "--audio=: give the folder"),
    ("librispeech", dict(alignments="/nowhere"), "--alignments=/nowhere: there is no such folder"),
    ("voxpopuli", dict(subset="raw"), "--subset=raw has no transcripts"),
    ("prose", dict(speakers=[8]), "give numbers from 0 to 7")])
def test_settings_that_cannot_work_stop_at_once(corpus, tools, tmp_path, name, options, message):
    (tmp_path / "empty").mkdir()
    places = dict(tools=tools, empty=tmp_path / "empty")
    options = {key: places.get(str(value), value) for key, value in options.items()}
    with pytest.raises(SystemExit, match=message):
        run(name, tools, **dict(source=corpus[0], out=tmp_path / "out") | options)
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_good_item_says_so(tools, tmp_path):
    write(tmp_path / "in/manifest.jsonl", '{"text": "no sound"}', '{"text": "none either"}')
    for _ in range(2):  # the second time from the record of the first
        with pytest.raises(SystemExit, match="not one document from 2 items; dropped {'no word times': 2}"):
            run("manifest", tools, tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in2/manifest.jsonl", "")
    with pytest.raises(SystemExit, match="no items found"):
        run("manifest", tools, tmp_path / "in2", tmp_path / "out2")
    write_parquet(tmp_path / "data/a.parquet", [dict(text="a")])
    with pytest.raises(SystemExit, match="no column document"):
        run("text", tools, tmp_path / "data", tmp_path / "no", field="document")


SCRIPTS = [path for path in sorted(Path(common.__file__).parent.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_every_setting_with_its_comment(capsys, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    assert f"python -m corpora.{path.stem} --" in text
    settings = text.partition("Settings:\n")[2].splitlines()
    assert settings and all(len(line[39:]) > 5 for line in settings)
