"""corpora/: each layout becomes the right data sets; bad items, shards and interruptions."""
import gzip
import io
import itertools
import json
import lzma
import os
import random
import runpy
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_audio import with_soundfile

from corpora import common, demo, files, parts
from data import open_source
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech.audio import read_audio
from speech.mel import fit_mel_units, load_mel_units, mel_frames, save_mel_units

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[speech]'")

RATE, WORD = 16000, 0.32  # Hz; seconds that each word takes in these tests
SENTENCES = ["She had your dark suit.", "It's the king, and he ran!", "A little dog sat down.", "Who knows?"]


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


def record(path, text):
    """Write what say() returns to a sound file, SPHERE if it is a .wav or .sph. Return the timed words."""
    waveform, timed = say(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, RATE, format="NIST" if path.suffix.lower() in (".sph", ".wav") else None)
    return timed


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_parquet(path, rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)


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


def documents(out, parts="*"):
    """Return all documents without EOS: (ids of each word, units of each word) if paired, otherwise ids."""
    found = []
    for path in sorted(Path(out).glob(f"{parts}/meta.json")):
        part = datasets.open_set(path.parent, full=True)
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
    """Return {id: reason} of all items that were dropped."""
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


@pytest.fixture
def aligner(monkeypatch):
    """A stand-in for the aligner: each word takes WORD seconds. Returns the list of texts that it was given."""
    def align_one(waveform, text):
        n = len(text.split())
        if n * WORD > len(waveform) / RATE + 0.01:
            return ValueError(f"audio too short for its transcript: {n} words")
        return [(i * WORD, (i + 1) * WORD) for i in range(n)]

    def align(waveforms, texts, aligner):
        calls.extend(texts)
        return list(map(align_one, waveforms, texts))

    calls = []
    monkeypatch.setattr(common, "load_aligner", lambda folder, device: "aligner")
    monkeypatch.setattr(common, "align", align)
    return calls


def test_no_name_leads_out_of_the_source(tmp_path):
    write(tmp_path / "out/x.sph", "secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    assert files.inside(tmp_path / "in", "a/../y.sph") == str(tmp_path / "in/y.sph")
    for name in ("link/x.sph", "../out/x.sph", "a/../../out/x.sph", str(tmp_path / "out/x.sph")):
        with pytest.raises(ValueError, match="^path outside the source: "):
            files.inside(tmp_path / "in", name)


# corpora

def test_librispeech(tools, tmp_path):
    """The first chapter has a TextGrid for all utterances but the last, the second chapter an alignment.txt."""
    chapter, other = (tmp_path / "LibriSpeech/dev-clean/84" / name for name in ("121123", "9"))
    aligned = tmp_path / "alignments/dev-clean/84"
    texts = ["SHE HAD YOUR DARK SUIT", "IT'S THE KING AND HE RAN", "A LITTLE DOG", "WHO KNOWS"]
    paths = [*(chapter / f"84-121123-000{i}.flac" for i in range(3)), other / "84-9-0000.flac"]
    timed = [record(path, text) for path, text in zip(paths, texts)]
    write(chapter / "84-121123.trans.txt", *(f"{path.stem} {text}" for path, text in zip(paths[:3], texts)))
    write(other / "84-9.trans.txt", "84-9-0000 WHO KNOWS")
    for path, words in zip(paths[:2], timed):
        end, intervals = words[-1][2], [f'{a}\n{b}\n"{word.lower()}"' for word, a, b in words]
        write(aligned / f"121123/{path.stem}.TextGrid", 'File type = "ooTextFile"', 'Object class = "TextGrid"', "",
              f'0\n{end}\n<exists>\n1\n"IntervalTier"\n"words"\n0\n{end}\n{len(words)}', *intervals)
    write(aligned / "9/84-9.alignment.txt", f'84-9-0000 ",WHO,KNOWS," "0,{WORD},{2 * WORD},9.9"')
    spoken = expect(tools, *((paths[i], texts[i]) for i in (0, 1, 3)))
    report = check("librispeech", tools, tmp_path, spoken, {"no word times": 1}, "LibriSpeech",
                   alignments=tmp_path / "alignments")
    assert (report["items"], report["documents"], report["words"]) == (4, 3, 13)
    assert list(dropped(tmp_path / "out")) == ["84-121123-0002"]
    assert report["hours"] == pytest.approx(13 * WORD / 3600)


def test_librilight(tools, tmp_path):
    path = tmp_path / "small/100/sea_fairies/01_baum.flac"
    record(path, "one two three four five " * 6)  # 9.6 s
    active = [[0.0, 1.0], [1.5, 2.9], [4.0, 9.6]]
    write(path.with_suffix(".json"), json.dumps(dict(speaker="100", voice_activity=active)))
    second = path.with_name("02_baum.flac")
    record(second, "one two three four five six")  # 1.92 s without voice activity
    spans = [(path, "x", 0, 2.9), (path, "x", 4, 4 + 5.6 / 2), (path, "x", 4 + 5.6 / 2, 9.6), (second, "x")]
    wanted = [sum(spoken, []) for _, spoken in expect(tools, *spans)]  # the units, not cut into words
    check("librilight", tools, tmp_path, wanted, {}, segment=3)


def test_libriheavy(tools, tmp_path, aligner):
    path = tmp_path / "light/small/100/sea/01_baum.flac"
    record(path, " ".join(SENTENCES))  # 5, 6, 5 and 2 words

    def cut(first, n, text, recording="small/100/sea/01_baum"):
        supervision = dict(custom=dict(texts=[text, text.upper()]))
        return dict(id=f"{recording}_{first}", start=first * WORD, duration=n * WORD, supervisions=[supervision],
                    recording=dict(id=recording))
    cuts = [cut(0, 5, SENTENCES[0]), cut(5, 6, SENTENCES[1]), cut(0, 2, "no such", "small/7/none"), dict(id="odd")]
    source = tmp_path / "libriheavy_cuts_small.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    wanted = expect(tools, (path, SENTENCES[0], 0, 5 * WORD), (path, SENTENCES[1], 5 * WORD, 11 * WORD))
    check("libriheavy", tools, tmp_path, wanted, {"unreadable audio": 1, "unreadable record": 1}, source,
          audio=tmp_path / "light", aligner="mms")


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
    check("swc", tools, tmp_path, wanted, {"no word times": 1, "unreadable file": 1}, "english")


def test_tedlium(tools, tmp_path, aligner):
    path = tmp_path / "legacy/train/sph/AlGore_2009.sph"
    record(path, "it's the king and he ran down")
    segments = [(0, 2, "<o,f0,male>", "it 's the"), (2, 4, "<o,f0,male>", "king <unk>"),
                (4, 5, "<F0_M>", "ignore_time_segment_in_scoring"), (5, 7, "<o,f0>", "ran(2) {NOISE} down <sil>")]
    lines = [f"AlGore_2009 1 AlGore {a * WORD:.2f} {b * WORD:.2f} {label} {text}" for a, b, label, text in segments]
    write(tmp_path / "legacy/train/stm/AlGore_2009.stm", *lines, "AlGore_2009 1 x")
    wanted = expect(tools, (path, "it's the", 0, 2 * WORD), (path, "ran down", 5 * WORD, 7 * WORD))
    reasons = {"unknown word in transcript": 1, "unreadable record": 1, "not transcribed": 1}
    check("tedlium", tools, tmp_path, wanted, reasons, aligner="mms")


def test_timit(tools, tmp_path):
    for name, sentence in zip(("TRAIN/SA1", "TRAIN/SI648", "TRAIN/SX37", "test/sx1"), SENTENCES):
        case = str.upper if name.isupper() else str.lower
        path = tmp_path / name
        timed = record(path.with_suffix(case(".wav")), sentence)
        times = [f"{round(a * RATE)} {round(b * RATE)} {word.strip('.,!?').lower()}" for word, a, b in timed]
        write(path.with_suffix(case(".txt")), f"0 {round(timed[-1][2] * RATE)} {sentence}")
        write(path.with_suffix(case(".wrd")), *times)
    (tmp_path / "TRAIN/SX37.TXT").unlink()
    wanted = expect(tools, (tmp_path / "TRAIN/SI648.WAV", SENTENCES[1]), (tmp_path / "test/sx1.wav", SENTENCES[3]))
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
    read = read_audio(path)  # the codec delays the sound by 22 samples
    assert abs(len(read) - samples.size) <= 640 and np.corrcoef(read[22:5022], samples[0, :5000])[0, 1] > 0.95
    report = run("asterisk", tools, tmp_path / "in", tmp_path / "out", aligner="pocketsphinx")
    assert aligner == ["seven little dogs"]
    assert report["documents"] == 1 and report["dropped"] == {"unreadable audio": 1, "no transcript": 1}


def test_both_layouts_of_peoples_speech(tools, tmp_path):
    names, rows = ["a/1.flac", "a/2.flac"], []
    for name, sentence in zip(names, SENTENCES):
        path = tmp_path / "train/clean" / name
        record(path, sentence)
        rows.append(dict(id=name, audio=dict(bytes=path.read_bytes(), path=name), text=sentence, duration_ms=1))
    lists = dict(duration_ms=[1600, 1920, 9], label=[*SENTENCES[:2], "x"], name=[*names, "../../../secret.flac"])
    write(tmp_path / "train/clean.json", json.dumps(dict(identifier="d", training_data=lists)), '{"identifier": "e"}')
    paired = expect(tools, *((tmp_path / "train/clean" / name, text) for name, text in zip(names, SENTENCES)))
    wanted = [list(itertools.chain(*units)) for _, units in paired]
    check("peoples_speech", tools, tmp_path, wanted, {"unreadable record": 2}, "train", kind="speech")
    write_parquet(tmp_path / "hub/train-00000-of-00001.parquet", rows)
    run("peoples_speech", tools, tmp_path / "hub", tmp_path / "out2", kind="speech")
    assert documents(tmp_path / "out2") == wanted


def test_stinystories(tools, tmp_path):
    path, rows = tmp_path / "x.flac", []
    for sentence in SENTENCES:
        timed = record(path, sentence)
        words = [dict(word=word.strip(".,!?").lower(), start_time=a, end_time=b) for word, a, b in timed]
        rows.append(dict(audio=dict(bytes=path.read_bytes(), path="x.flac"), text=sentence, aligned_text=words))
    rows[1]["aligned_text"], rows[2]["audio"], rows[3]["aligned_text"][1]["end_time"] = [], None, 5.0
    write_parquet(tmp_path / "data/data-00000-of-00001.parquet", rows)
    record(path, SENTENCES[0])
    reasons = {"no word times": 1, "no audio": 1, "word times outside the audio": 1}
    check("stinystories", tools, tmp_path, expect(tools, (path, SENTENCES[0])), reasons)


def test_prose(tools, tmp_path):
    """Each document ends with a sentence, and Gutenberg's frame is left out."""
    pytest.importorskip("espeakng_loader")
    write(tmp_path / "books/whale.txt", "A free licence.", "*** START OF THIS PROJECT GUTENBERG EBOOK WHALE ***",
          "The _Whale_ sank -- so they said -- at", "9 o'clock! And then?",
          "*** END OF THIS PROJECT GUTENBERG EBOOK WHALE ***", "Much more about the licence.")
    wanted = []
    for passage in ("The Whale sank so they said at 9 o'clock!", "And then?"):
        waveform, times = demo.record(passage, 4)
        wanted.append(expected(tools, passage, waveform, [end for _, end in times]))
    check("prose", tools, tmp_path, wanted, {}, "books", passage=6, speakers=[4])


def test_prose_in_another_language(tools, tmp_path):
    """docs/train_for_real.md: Spanish, in a voice of espeak-ng that corpora/demo.py does not list."""
    pytest.importorskip("espeakng_loader")
    write(tmp_path / "book.txt", *["La niña vio un pájaro azul. ¿Adónde volaba?"] * 25)
    options = dict(passage=8, speakers=[["es", 180, 50]])
    report = run("prose", tools, tmp_path / "book.txt", tmp_path / "out", **options)
    assert report["documents"] >= 20 and report["documents"] + sum(report["dropped"].values()) == 25
    ids, units = documents(tmp_path / "out")[0]
    assert len(ids) == len(units) == 8 and sum(map(len, units)) > 5
    with pytest.raises(SystemExit, match="give numbers from 0 to 7, or .voice, words a minute, pitch., such as"):
        run("prose", tools, tmp_path / "book.txt", tmp_path / "out2", speakers=[["es"]])


def test_text_of_every_format(tools, tmp_path):
    pyarrow, folder = pytest.importorskip("pyarrow"), tmp_path / "in"
    texts = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES * 11)]
    lines = [json.dumps(dict(text=text)) for text in texts]
    write(folder / "a/1.txt", texts[0])
    (folder / "a/2.txt").write_bytes(b"caf\xe9")
    write(folder / "b.jsonl", lines[1], '{"text": ""}', '{"text": 5}', '{"text"', "", lines[2])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[3].encode()))
    (folder / "d.jsonl.gz").write_bytes(b"not gzip at all")
    write_parquet(folder / "e.parquet", [dict(id=1, text=text) for text in [*texts[4:33], None]])
    (folder / "g.jsonl.zst").write_bytes(pyarrow.compress("\n".join(lines[33:]).encode(), "zstd", asbytes=True))
    wanted = list(map(Tokenizer(tools / "tokenizer.json").encode, [texts[0] + "\n", *texts[1:]]))
    reasons = {"text is not UTF-8": 1, "empty document": 2, "unreadable record": 2, "unreadable file": 1}
    report = check("text", tools, tmp_path, wanted, reasons, "in")
    assert report["tokens"] == {"text": sum(map(len, wanted)) + len(wanted)}


def test_each_bad_item_is_dropped_with_its_reason(tools, tmp_path, aligner):
    path = tmp_path / "in/good.flac"
    timed = record(path, SENTENCES[0])
    for name, seconds in (("short", 0.01), ("long", 2)):
        soundfile.write(tmp_path / f"in/{name}.wav", np.ones(int(seconds * RATE)).cumsum() % 2, RATE)
    good = dict(audio="good.flac", text=SENTENCES[0], words=timed)
    late = [(word, a + 0.16, b + 0.16) for word, a, b in timed]
    last = dict(audio="good.flac", start=WORD, end=5 * WORD, text="had your dark suit.", words=timed[1:])
    bad = {"no transcript": good | dict(text="  "), "no audio": dict(text="Hello", words=[["hello", 0, 1]]),
           "transcript does not match word times": good | dict(text="Something else"),
           "word times outside the audio": good | dict(words=late),
           "audio too short for its transcript": good | dict(text="much " * 40, words=None),
           "audio too short": dict(audio="short.wav", text="a", words=[["a", 0, 0.01]]), "unreadable record": "a",
           "audio too long": good | dict(audio="long.wav"), "span outside the audio": good | dict(start=0.1, end=7),
           "no text": good | dict(text="She\0 had"),
           "unexpected fault": good | dict(text=["She"]), "text is not UTF-8": good | dict(text="\ud800 she")}
    write(tmp_path / "in/manifest.jsonl", *map(json.dumps, [good, *bad.values(), last]))
    wanted = expect(tools, (path, SENTENCES[0]), (path, last["text"], WORD, 5 * WORD))
    check("manifest", tools, tmp_path, wanted, dict.fromkeys(bad, 1), "in", aligner="mms", max_seconds=1.9)
    assert aligner == ["much " * 40]  # items with word times do not go to the aligner


def test_links_and_capitals_and_what_is_left_out(tools, tmp_path):
    """A folder behind a link, a link that leads back, two endings in capitals, a link to nothing, files of no use."""
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for i, path in enumerate((source / "a/0.flac", elsewhere / "1.FLAC", elsewhere / "unused.wav")):
        timed = record(path, SENTENCES[i])
        write(path.parent / ("LIST.JSONL" if i else "list.jsonl"),
              json.dumps(dict(audio=path.name, text=SENTENCES[i], words=timed)) if i < 2 else "")
    write(elsewhere / "LIST.JSONL", json.dumps(dict(audio="1.FLAC", text=SENTENCES[1], words=say(SENTENCES[1])[1])))
    (source / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    write(source / "._list.jsonl", "of macOS")
    write(source / "notes.PDF", "")
    wanted = expect(tools, (source / "a/0.flac", SENTENCES[0]), (elsewhere / "1.FLAC", SENTENCES[1]))
    report = check("manifest", tools, tmp_path, wanted, {}, "in")
    assert report["left_out"] == {".pdf": 1, ".wav": 1, ".jsonl": 2}
    left_out = json.loads((tmp_path / "out/left_out.json").read_text())
    assert left_out == [str(source / name) for name in ("._list.jsonl", "gone.jsonl", "link/unused.wav", "notes.PDF")]


def test_out_may_lie_inside_the_source(tools, tmp_path):
    """A second run does not read dropped.jsonl and what else the first has made."""
    timed = record(tmp_path / "a.flac", SENTENCES[0])
    good = dict(audio="a.flac", text=SENTENCES[0], words=timed)
    write(tmp_path / "list.jsonl", json.dumps(good), json.dumps(good | dict(text="other")))
    for out in ("sets/out", "sets/out", "sets/again"):
        report = run("manifest", tools, tmp_path, tmp_path / out)
        assert (report["items"], report["documents"]) == (2, 1)
    assert run("manifest", tools, tmp_path, tmp_path / "x")["left_out"] == {}  # nothing that the others have made
    write(tmp_path / "o/in/a.jsonl", json.dumps(dict(text="Who knows?")))
    assert run("text", tools, tmp_path / "o/in", tmp_path / "o", kind="text")["documents"] == 1  # --source inside --out
    with pytest.raises(SystemExit, match="--out=.*: is --source; give a folder of its own"):
        run("manifest", tools, tmp_path, tmp_path)


ENGLISH = {  # the listing that a script reads, in {path: lines}; the first path is given to read()
    "text": {"tale.txt": [SENTENCES[0], "", SENTENCES[1]]},
    "manifest": {"a.jsonl": [json.dumps(dict(text="é", words=[["é", 0, 1]])), json.dumps(dict(text="Who knows?"))]},
    "librispeech": {"1-2.trans.txt": ["1-2-0000 SHE HAD", "1-2-0001 YOUR DARK SUIT"],
                    "1-2.alignment.txt": ['1-2-0000 ",SHE,HAD," "0.1,0.4,0.8,1.0"']},
    "timit": {"X/SA1.WRD": ["0 8000 she", "8000 16000 had"], "X/SA1.TXT": ["0 16000 She had."], "X/SA1.WAV": [""]},
    "voxpopuli": {"asr_train.tsv": ["id\traw_text\tnormalized_text", "2020-x\tShe had.\tshe had", "2020-y\t\twho"]},
    "tedlium": {"stm/A.stm": ["A 1 A 0.0 1.5 <o,f0,male> she had", "A 1 A 1.5 2.5 your dark suit", "A 1 A 3 4 <unk>",
                             "A 1 A 4 5 <o, f0, male> who <breath> knows", " ;; a comment"]},
    "asterisk": {"usr/share/doc/x/core-sounds-en.txt.gz": ["digits/7: seven", "digits/8: eight"]},
    "prose": {"book.txt": [SENTENCES[0], SENTENCES[1]]}}
OPTIONS = dict(kind="paired", field="text", alignments="", lower=False, passage=5, speakers=[0])


@pytest.mark.parametrize("name", ENGLISH)
def test_what_stands_between_file_and_text_is_no_part_of_it(tmp_path, name):
    """Byte order marks, line ends and a missing last line end, in every kind of text file that a script opens."""
    found = []
    for mark, codec, end, ends in (("", "utf-8", "\n", 1), ("\ufeff", "utf-8", "\n", 1), ("", "utf-8", "\r\n", 1),
                                   ("", "utf-16-le", "\n", 1), ("", "utf-16-be", "\n", 1),
                                   ("\ufeff", "utf-16-le", "\r\n", 1), ("\ufeff", "utf-16-be", "\n", 0),
                                   ("\ufeff", "utf-32-le", "\n", 0)):
        for path, lines in ENGLISH[name].items():
            raw = (mark + end.join(lines) + end * ends * (name != "text")).encode(codec)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(gzip.compress(raw) if path.endswith(".gz") else raw)
        items = runpy.run_module(f"corpora.{name}")["read"](tmp_path / next(iter(ENGLISH[name])), OPTIONS)
        found.append([(item.id, item.text, item.start, item.words) if isinstance(item, common.Item)
                      else (item.id, str(item.error)) for item in items])
    assert all(items == found[0] for items in found) and found[0]
    assert not any("\ufeff" in str(item) or "\r" in str(item) for item in found[0])
    if name == "tedlium":
        assert [item[1] for item in found[0]] == ["she had", "your dark suit", "unknown word in transcript: '<unk>'",
                                                     "who knows"]
    if name == "librispeech":
        assert found[0][0] == ("1-2-0000", "SHE HAD", 0.0, [("SHE", 0.1, 0.4), ("HAD", 0.4, 0.8)])


@pytest.mark.parametrize("ending", ["gz", "zst", "xz"])
def test_a_compressed_file_that_breaks_off(tools, tmp_path, ending):
    """What can be read is read. The file is named, and not a record that would be to blame."""
    pyarrow, rng, frames = pytest.importorskip("pyarrow"), random.Random(0), []
    packers = dict(gz=gzip.compress, xz=lzma.compress, zst=lambda raw: pyarrow.compress(raw, "zstd", asbytes=True))
    lines = [json.dumps(dict(text=" ".join(rng.choices(SENTENCES, k=20)))) + "\n" for _ in range(6000)]
    for part in (lines[:3000], lines[3000:]):  # two frames, as parallel packers write them
        frames.append(packers[ending]("".join(part).encode()))
    for share in (1.0, 0.8):
        path = tmp_path / f"{share}/a.jsonl.{ending}"
        path.parent.mkdir()
        path.write_bytes(b"".join(frames)[:int(share * sum(map(len, frames)))])
        report = run("text", tools, path.parent, tmp_path / f"out{share}", kind="text")
        if share == 1:
            assert report["documents"] == report["items"] == 6000
            continue
        assert 3000 <= report["documents"] == report["items"] - 1 < 6000 and report["dropped"] == {"unreadable file": 1}
        (reason,) = dropped(tmp_path / f"out{share}").values()
        assert f"damaged or cut short after line {report['documents']}; what follows is lost" in reason


def test_only_the_whole_sound_goes_with_a_text(tools, tmp_path, aligner):
    """Joined recordings are read in full. Broken and silent ones are dropped with the reason, at every entrance."""
    flacs = [with_soundfile(say(sentence)[0], format="FLAC") for sentence in SENTENCES[:2]]
    whole = np.concatenate([soundfile.read(io.BytesIO(flac), dtype="float32")[0] for flac in flacs])
    contents = dict(joined=b"".join(flacs), broken=with_soundfile(whole, format="OGG")[:-20],
                    zero=with_soundfile(0 * whole, format="WAV"),
                    cancel=with_soundfile(np.stack([whole, -whole], 1), format="WAV"))
    for name, content in contents.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.wav").write_bytes(content)
    text = " ".join(SENTENCES[:2])
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(audio=f"{name}.wav", text=text)) for name in contents))
    reasons = {"unreadable audio": 1, "silent audio": 2}
    wanted = [expected(tools, text, whole, WORD * np.arange(1, 12))]
    check("manifest", tools, tmp_path, wanted, reasons, "in", aligner="mms")
    assert run("manifest", tools, tmp_path / "in", tmp_path / "s", kind="speech")["dropped"] == reasons


# parts, shards, interruptions

@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tools):
    """A manifest of 300 short recordings, some of them bad, and what a run without interruptions makes of it."""
    source, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("whole") / "out"
    timed = [record(source / f"{i}.flac", sentence) for i, sentence in enumerate(SENTENCES)]
    records = [dict(audio=f"{i % 5}.flac", text=SENTENCES[i % 4], words=timed[i % 4]) for i in range(300)]
    write(source / "manifest.jsonl", *map(json.dumps, records))
    run("manifest", tools, source, out, part_tokens=900)
    return source, out


def contents(out):
    """What a run has made: its documents, what it dropped, and its report without the times."""
    report = json.loads((out / "report.json").read_text())
    return documents(out), dropped(out), report | dict(seconds=0)


def test_parts_are_one_sharded_set_and_their_counts_add_up(corpus, tools):
    found, bad, report = contents(corpus[1])
    records = [json.loads(path.read_text()) for path in sorted(corpus[1].glob("*/part.json"))]
    assert [record["first"] for record in records] == [0, 128, 256] and records[-1]["next"] == report["items"] == 300
    assert [record["last"] for record in records] == [False, False, True]
    assert len(found) == report["documents"] and len(bad) == sum(report["dropped"].values()) == 300 - len(found) > 0
    hashes = Tokenizer(tools / "tokenizer.json").hash, load_mel_units(str(tools / "units")).hash
    assert len(open_source("interleaved", [corpus[1]], *hashes).shards) == 3


def test_the_number_of_workers_changes_nothing(corpus, tools, tmp_path):
    run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900, workers=2)
    assert contents(tmp_path / "out") == contents(corpus[1])


def test_units_of_a_model_are_made_in_the_main_process(corpus, tools, tmp_path, monkeypatch):
    shutil.copytree(tools / "units", tmp_path / "units")
    about = json.loads((tmp_path / "units/units.json").read_text())
    (tmp_path / "units/units.json").write_text(json.dumps(about | dict(kind="hubert")))
    monkeypatch.setattr(common, "load_units", lambda folder, device="cpu": load_mel_units(str(tools / "units")))
    run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900, units=tmp_path / "units")
    assert contents(tmp_path / "out") == contents(corpus[1])


def test_shards_together_hold_what_one_run_holds(corpus, tools, tmp_path):
    for i in (2, 0, 1, 2):
        assert run("manifest", tools, corpus[0], tmp_path, part_tokens=300, shard=f"{i}/3")["parts"] == 2
        if i == 1:
            shutil.rmtree(tmp_path / "shard-2-of-3-00001")  # the last run has to make it again
    shards = [iter(documents(tmp_path, f"shard-{i}-of-3-*")) for i in range(3)]
    bad = {int(name.partition(":")[2]) - 1 for name in dropped(corpus[1])}
    assert [next(shards[i % 3]) for i in range(300) if i not in bad] == documents(corpus[1])
    assert dropped(tmp_path) == dropped(corpus[1])


@pytest.mark.parametrize("owner, name, calls, finished", [
    (common, "finish", 4, 1), (parts, "write_set", 3, 2), (os, "rename", 1, 0), (common, "write_report", 1, 3)])
def test_an_interrupted_run_goes_on(corpus, tools, tmp_path, monkeypatch, owner, name, calls, finished):
    """A run dies in one of these calls. The same command then leaves what an undisturbed run leaves."""
    real, count = getattr(owner, name), itertools.count(1)

    def dying(*args):
        if next(count) < calls:
            return real(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dying)
        run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)
    assert len(list((tmp_path / "out").glob("*/meta.json"))) == finished  # open_source sees nothing unfinished
    run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)
    assert contents(tmp_path / "out") == contents(corpus[1]) and not list((tmp_path / "out").glob(".*"))


def test_parts_of_other_settings_and_missing_parts_are_refused(corpus, tools, tmp_path):
    shutil.copytree(corpus[1], tmp_path / "out")
    path = tmp_path / "out/shard-0-of-1-00001/part.json"
    whole = path.read_text()
    for key in ("corpus", "kind", "files", "shards", "block", "part_tokens", "max_seconds", "tokenizer", "units"):
        record = json.loads(whole)
        record["identity"][key] = "other"
        path.write_text(json.dumps(record))
        with pytest.raises(SystemExit, match=f"shard-0-of-1-00001: was made with {key} 'other', now it is "):
            run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)
    shutil.rmtree(path.parent)
    with pytest.raises(SystemExit, match="shard-0-of-1-00002: the part before it is missing"):
        run("manifest", tools, corpus[0], tmp_path / "out", part_tokens=900)


@pytest.mark.parametrize("name, options, message", [
    ("manifest", dict(source="/nowhere"), "--source=/nowhere: give an existing file or folder"),
    ("manifest", dict(tokenizer=""), "--tokenizer=: .* a paired set needs it"), ("manifest", dict(out=""), "--out is"),
    ("manifest", dict(kind="video"), "this corpus gives paired, speech, text"),
    ("manifest", dict(shard="3/3"), "--shard=3/3: write i/n"), ("timit", {}, "nothing of timit found"),
    ("libriheavy", {}, "--audio=: give the folder"), ("voxpopuli", dict(subset="raw"), "raw has no transcripts")])
def test_settings_that_cannot_work_stop_at_once(corpus, tools, tmp_path, name, options, message):
    with pytest.raises(SystemExit, match=message):
        run(name, tools, **dict(source=corpus[0], out=tmp_path / "out") | options)
    assert not (tmp_path / "out").exists()


SCRIPTS = [path for path in sorted(Path(common.__file__).parent.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_the_command_and_every_setting_with_its_comment(capsys, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    assert f"python -m corpora.{path.stem} --" in text
    settings = text.partition("Settings:\n")[2].splitlines()
    assert settings and all(len(line[39:]) > 5 for line in settings)


def test_held_out_items_and_a_limit_of_tokens(tools, tmp_path):
    """The two splits are the whole corpus, for any number of shards, and a machine's folder may lie in another."""
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(text=f"{s} {i}")) for i in range(600) for s in SENTENCES))
    options = dict(kind="text", part_tokens=5000)
    run("text", tools, tmp_path / "in", tmp_path / "all", **options)
    for split in ("train", "val"):
        for shard in ("0/2", "1/2"):
            run("text", tools, tmp_path / "in", tmp_path / split / "machine", val_share=0.1, split=split, shard=shard,
                **options)
    every, train, val = (sorted(documents(tmp_path / name)) for name in ("all", "train/machine", "val/machine"))
    assert sorted(train + val) == every and len(every) == 2400 and 180 < len(val) < 300
    (tmp_path / "train/machine/.hidden").mkdir()
    shards = open_source("text", [tmp_path / "train"]).shards
    assert sum(shard.meta["documents"] for shard in shards) == len(train)
    size = sum(map(len, every))
    report = run("text", tools, tmp_path / "in", tmp_path / "some", max_tokens=size // 3, **options)
    some = documents(tmp_path / "some")
    assert size / 3 <= report["tokens"]["text"] < size / 2 and some == documents(tmp_path / "all")[:len(some)]
    assert run("text", tools, tmp_path / "in", tmp_path / "some", max_tokens=size // 3, **options) == report
    with pytest.raises(SystemExit, match="was made with max_tokens .*, now it is 0"):
        run("text", tools, tmp_path / "in", tmp_path / "some", **options)


def test_shards_by_files_and_under_torchrun(tools, tmp_path, monkeypatch):
    for i in range(5):
        write(tmp_path / f"in/{i}.jsonl", *(json.dumps(dict(text=f"{s} {i}")) for s in SENTENCES))
    run("text", tools, tmp_path / "in", tmp_path / "all", kind="text")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        report = run("text", tools, tmp_path / "in", tmp_path / "two", kind="text", shard_by="files")
        assert report["items"] == (12, 8)[rank]
        for machine in (0, 1):  # two machines with two processes each
            run("text", tools, tmp_path / "in", tmp_path / "four", kind="text", shard=f"{machine}/2")
    every = sorted(documents(tmp_path / "all"))
    assert sorted(documents(tmp_path / "two")) == sorted(documents(tmp_path / "four")) == every
    assert len(list((tmp_path / "four").glob("shard-?-of-4-00000"))) == 4


def test_sound_that_is_not_there_yet(tools, tmp_path):
    """The same command makes the set when the sound has come; many missing files in a row end a run at once."""
    path, manifest = tmp_path / "in/a.flac", tmp_path / "in/a.jsonl"
    timed = record(path, SENTENCES[0])
    line = json.dumps(dict(audio="a.flac", text=SENTENCES[0], words=timed))
    write(manifest, line, line)
    path.rename(tmp_path / "later.flac")
    with pytest.raises(SystemExit, match="not one document from 2 items; dropped .'unreadable audio': 2"):
        run("manifest", tools, tmp_path / "in", tmp_path / "out")
    (tmp_path / "later.flac").rename(path)
    assert run("manifest", tools, tmp_path / "in", tmp_path / "out")["documents"] == 2
    write(manifest, *[line.replace("a.flac", "b.flac")] * 20, line)
    with pytest.raises(SystemExit, match="b.flac: does not exist, nor does the sound of any of the first 20 items"):
        run("manifest", tools, tmp_path / "in", tmp_path / "out2")
    write(manifest, line, *[line.replace("a.flac", "b.flac")] * 30)
    assert run("manifest", tools, tmp_path / "in", tmp_path / "out3")["dropped"] == {"unreadable audio": 30}


def test_more_shards_than_files(tools, tmp_path):
    write(tmp_path / "in/a.jsonl", *(json.dumps(dict(text=s)) for s in SENTENCES))
    for shard in ("0/2", "1/2"):
        options = dict(kind="text", shard_by="files", shard=shard)
        if shard == "0/2":
            assert run("text", tools, tmp_path / "in", tmp_path / "out", **options)["documents"] == 4
    report = run("text", tools, tmp_path / "in", tmp_path / "out", **options)
    assert (report["items"], report["documents"], report["shard"]) == (0, 0, "1/2")
    assert len(documents(tmp_path / "out")) == 4
