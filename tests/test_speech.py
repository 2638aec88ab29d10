"""speech/: wav files, espeak, word units, mel units and their sound, the command. corpora/demo.py: the demo corpus."""
import io
import itertools
import json
import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from corpora import demo
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech.__main__ import main
from speech.audio import SAMPLE_RATE, read_audio
from speech.espeak import espeak, espeak_phones
from speech.mel import (
    N_CEPSTRUM,
    N_MEL,
    fit_mel_units,
    frame_units,
    griffin_lim,
    load_mel_units,
    log_mel,
    mel_frames,
    mel_matrix,
    mel_to_magnitude,
    save_mel_units,
    voice,
)
from speech.units import HOP, cheapest_path, collapse, load_units, read_ids, resynthesise, word_units

TEXT = "Once there was a little dog. It was of the king, and ran into the barn."
TEXTS = ["The little dog ran into the barn and saw a king.", "Once there was a woman who had seven green apples.",
         "It was a cold night, and nobody heard the old bell.", "He took the bread out of the box and went home."]
VOICES = [("en-us", 180, 45), ("en-us+f1", 190, 60), ("en-gb-x-rp", 190, 45), ("en-us+m3", 200, 50)]


@pytest.fixture(scope="module")
def spoken():
    """Sixteen waveforms and mel units fitted on them."""
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install -e '.[speech]'")
    waveforms = [espeak(text, *who)[0] for text in TEXTS for who in VOICES]
    frames = [mel_frames(waveform) for waveform in waveforms]
    return waveforms, fit_mel_units(frames, 60, 0, voices=[voice(waveform) for waveform in waveforms])


def test_a_wav_without_its_last_sample_is_refused():
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1000), 16000, format="WAV")
    raw = file.getvalue()  # the header has 44 bytes and ends with the name and the size of the data
    odd = raw[:36] + b"LIST\3\0\0\0abc\0" + raw[36:]  # a chunk of odd size is followed by one more byte
    piped = raw[:40] + b"\xff\xff\xff\xff" + raw[44:]
    for whole in (raw, odd, piped):
        assert len(read_audio(whole)) == 1000
    for cut in (raw[:-2], odd[:-2]):
        with pytest.raises(ValueError, match="^unreadable audio: .* breaks off"):
            read_audio(cut)


def test_espeak_times_every_word(spoken):
    waveform, words = espeak(TEXT)
    assert waveform.dtype == np.float32 and 0.1 < np.abs(waveform).max() <= 1
    assert len(words) == len(TEXT.split())  # "of the" too, which espeak-ng says as one
    assert all(start < end for start, end in words)
    assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(words))
    assert words[-1][1] <= len(waveform) / SAMPLE_RATE
    start, end = words[5][1], words[6][0]  # the pause between the sentences
    assert end - start > 0.1 and np.abs(waveform[int(start * 16000) + 200:int(end * 16000) - 200]).max() < 0.02


def test_espeak_phones_are_in_order(spoken):
    waveform, phones = espeak_phones("A cat, a dog.")
    names, starts = zip(*phones)
    assert " ".join(names).replace("_ _", "_").split("_")[:2] == ["a# k a t ", " a# d 0 g "]
    assert sorted(starts) == list(starts) and starts[-1] <= len(waveform) / SAMPLE_RATE


def test_demo_voices_depend_on_neither_the_clock_nor_what_was_said_before(spoken):
    first = [espeak(TEXT, *speaker) for speaker in demo.SPEAKERS]
    time.sleep(1.1)  # some voices draw noise from a clock that counts seconds
    for speaker, (waveform, words) in reversed(list(zip(demo.SPEAKERS, first))):
        again, same_words = espeak(TEXT, *speaker)
        assert np.array_equal(again, waveform) and same_words == words, speaker


def test_espeak_refuses_unknown_voices(spoken):
    with pytest.raises(ValueError, match="no voice 'xx-nobody'"):
        espeak("Hello", "xx-nobody")


@given(frames=st.lists(st.integers(0, 3), min_size=1, max_size=40), rate=st.sampled_from([25, 50]),
       ends=st.lists(st.floats(0, 1.7), min_size=1, max_size=9).map(sorted))
@example(frames=[0, 1] * 16, rate=25, ends=[1.1596, 1.2])  # frame 28.99
@example(frames=[0, 1] * 16, rate=25, ends=[1.16, 1.2])  # frame 29, in floating point 28.999999999999996
@settings(max_examples=300, deadline=None)
def test_words_own_units_as_the_rule_says(frames, rate, ends):
    ids, frame_start = collapse(frames)
    assert np.repeat(ids, np.diff([*frame_start, len(frames)])).tolist() == frames and np.diff(ids.astype(int)).all()
    offsets = word_units(ends, frame_start, len(frames), rate)
    owner = [sum(frame >= int(rate * end + 1e-6) for end in ends[:-1]) for frame in range(len(frames))]
    last_frame = [*(frame_start[1:] - 1), len(frames) - 1]  # a unit that spans two words goes to the later one
    assert np.repeat(np.arange(len(ends)), np.diff(offsets)).tolist() == [owner[frame] for frame in last_frame]
    assert (offsets[0], offsets[-1]) == (0, len(ids))


@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_cheapest_path_is_the_cheapest_of_all(n, k, penalty, seed):
    cost = np.random.default_rng(seed).random((n, k))

    def total(path):
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return sum(cost[t, state] for t, state in enumerate(path)) + penalty * changes
    best = min(map(total, itertools.product(range(k), repeat=n)))
    assert total(cheapest_path(cost, penalty)) == pytest.approx(best)


def test_mel_units_of_any_length_and_level(spoken):
    waveform, codebook = spoken[0][0], spoken[1]
    [(ids, starts)] = codebook.encode([waveform])
    assert len(ids) == len(starts) and ids.max() < 60
    assert (np.diff(starts) > 0).all() and (np.diff(ids.astype(int)) != 0).all()
    assert starts[-1] < len(waveform) // HOP
    assert np.array_equal(codebook.encode([waveform * 0.3])[0][0], ids)
    for n, units in ((0, 0), (639, 0), (640, 1), (16000, 1)):
        assert len(codebook.encode([np.zeros(n, np.float32)])[0][0]) == units


def test_mel_units_are_the_same_after_another_fit_and_from_their_folder(spoken, tmp_path):
    waveforms, codebook = spoken
    frames = [mel_frames(waveform) for waveform in waveforms]
    again = fit_mel_units(frames, 60, 0, voices=[voice(waveform) for waveform in waveforms])
    save_mel_units(tmp_path, codebook)
    for other in (again, load_units(tmp_path)):
        assert np.array_equal(other.centroids, codebook.centroids) and other[1:] == codebook[1:]


@pytest.mark.parametrize("changes, message", [
    (dict(kind="hubert"), "kind is 'hubert', not 'mel'"), (dict(kind=[]), "kind is \\[\\]"),
    (dict(features={}), "not mel units of this version"), (dict(n_units=61), "units.json says 61"),
    (dict(hash="0"), "does not fit the hash"), (dict(penalty=None), "must be finite numbers"),
    (dict(voice=[10**400]), "must be finite numbers"), (dict(durations=float("inf")), "not a whole unit vocabulary")])
def test_damaged_mel_units_are_refused(spoken, tmp_path, changes, message):
    save_mel_units(tmp_path, spoken[1])
    about = json.loads((tmp_path / "units.json").read_text())
    (tmp_path / "units.json").write_text(json.dumps(about | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_mel_units(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def distance(a, b):
    """
    Mel-cepstral distance in dB: the mean over 10 ms frames of the RMS difference of two log-mel spectra.

    The spectra are smoothed by keeping cepstra 1 to 12, and each loses its mean over the recording.
    """
    a, b = (dct(log_mel(waveform), norm="ortho")[:, 1:N_CEPSTRUM] for waveform in (a, b))
    difference = (a - a.mean(0)) - (b - b.mean(0))
    return 10 / np.log(10) * np.sqrt((difference**2).sum(1) / N_MEL).mean()


def test_griffin_lim_gives_the_spectrum_it_was_given(spoken):
    waveform = spoken[0][0]
    mel = np.exp(log_mel(waveform))
    magnitude = mel_to_magnitude(mel)
    assert magnitude.min() >= 0
    back = np.log(magnitude.astype(np.float64)**2 @ mel_matrix() + 1e-12)
    assert np.abs(10 / np.log(10) * (back - np.log(mel))).mean() < 0.5
    again = griffin_lim(magnitude)
    assert again.dtype == np.float32 and len(again) == len(waveform) // HOP * HOP
    assert distance(waveform, again) < min(1, distance(waveform, griffin_lim(magnitude, momentum=0)))
    assert np.array_equal(again, griffin_lim(magnitude))
    assert 0.8 < np.sqrt((again**2).mean() / (waveform**2).mean()) < 1.25


def test_mel_units_can_be_heard_again(spoken):
    """With true durations the speech is nearer to the original than its units in another order, noise or silence."""
    waveforms, codebook = spoken
    rng, distances = np.random.default_rng(0), []
    for waveform in waveforms[::5]:
        [(ids, starts)] = codebook.encode([waveform])
        durations = np.diff(np.append(starts, len(waveform) // HOP))
        again = resynthesise(ids, codebook, durations=durations)
        assert again.dtype == np.float32 and len(again) == len(waveform) // HOP * HOP
        assert np.isfinite(again).all() and np.abs(again).max() > 0.05
        order = rng.permutation(len(ids))
        shuffled = resynthesise(ids[order], codebook, durations=durations[order])
        noise = (rng.standard_normal(len(again)) * 0.1).astype(np.float32)
        original = waveform[:len(again)]
        distances.append([distance(original, w) for w in (again, shuffled, noise, np.zeros_like(again))])
    distances = np.array(distances)
    assert distances[:, 0].mean() < 6.5 and (distances[:, 1:].mean(0) > 8).all()
    assert (distances[:, 0] < 0.75 * distances[:, 1:].min(1)).all()


def test_units_last_as_long_as_their_mean_run(spoken):
    waveforms, codebook = spoken
    runs = {}
    for waveform in waveforms:
        for unit, run in itertools.groupby(frame_units(mel_frames(waveform), codebook).tolist()):
            runs.setdefault(unit, []).append(len(list(run)))
    assert len(codebook.durations) == 60 and len(runs) > 40
    for unit, duration in enumerate(codebook.durations):
        assert duration == pytest.approx(np.mean(runs.get(unit, [1])), abs=1e-3)
    for ids, _ in codebook.encode(waveforms[::3]):
        assert len(resynthesise(ids.tolist(), codebook)) == HOP * round(sum(codebook.durations[i] for i in ids))


def test_resynthesis_refuses_what_it_cannot_say(spoken, tmp_path):
    codebook = spoken[1]
    assert len(resynthesise([], codebook)) == 0
    for ids in ([60], [-1], [1.5], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="integers from 0 to 59"):
            resynthesise(ids, codebook)
    save_mel_units(tmp_path, codebook)
    about = json.loads((tmp_path / "units.json").read_text())
    del about["durations"], about["voice"]  # folders from before units could be spoken lack these
    (tmp_path / "units.json").write_text(json.dumps(about))
    old = load_units(tmp_path)
    assert old.hash == codebook.hash and (old.n_units, old.rate) == (60, 25)
    with pytest.raises(ValueError, match="no durations and no voice"):
        resynthesise([1, 2], old)


def test_the_command_gives_units_and_speaks_and_draws_them(spoken, tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    waveforms, codebook = spoken
    units = f"--units={tmp_path / 'units'}"
    save_mel_units(tmp_path / "units", codebook)
    soundfile.write(tmp_path / "x.wav", waveforms[0], 16000, subtype="FLOAT")
    main(["units", str(tmp_path / "x.wav"), units])
    (tmp_path / "x.json").write_text(capsys.readouterr().out)
    ids = read_ids(tmp_path / "x.json")
    assert ids.tolist() == codebook.encode([waveforms[0]])[0][0].tolist()

    main(["say", str(tmp_path / "x.json"), units, f"--out={tmp_path / 'y.wav'}"])
    waveform, rate = soundfile.read(tmp_path / "y.wav", dtype="float32")
    assert rate == 16000 and np.abs(waveform - resynthesise(ids, codebook)).max() < 1e-3

    (tmp_path / "x.WRD").write_text("0 1600 the\n1600 8000 little\n")
    main(["draw", str(tmp_path / "x.wav"), units, f"--times={tmp_path / 'x.WRD'}", f"--out={tmp_path / 'x.png'}"])
    assert "x.png: 2 words" in capsys.readouterr().out and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("argv, message", [
    (["play", "x.wav"], "give units, say or draw, then a file"),
    (["units"], "give units, say or draw, then a file"), (["say", "none.json"], "none.json: cannot be read"),
    (["units", "x.wav", "--units=none"], "none: not a whole unit vocabulary")])
def test_mistakes_in_the_command_are_one_line(argv, message):
    with pytest.raises(SystemExit, match=f"^[^\n]*{message}[^\n]*$"):
        main(argv)


# The demo corpus

def content(text):
    return set(re.findall(r"[a-z]+", text.lower())) - demo.FUNCTION_WORDS


def test_no_ending_is_given_away_by_a_word():
    assert demo.check_grammar() > 100_000
    stories = demo.write_stories(6000, 3)
    assert len({" ".join(s.sentences) for s in stories}) == 6000
    endings, openings = {}, {}
    for story in stories:
        endings.setdefault(story.topic, set()).update(content(story.sentences[3]))
        openings.setdefault(story.topic, set()).update(content(" ".join(story.sentences[:3])))
    for topic, words in endings.items():
        assert not words & set().union(*openings.values())
        assert not words & set().union(*(w for t, w in endings.items() if t != topic))


def test_the_hiss_has_the_promised_level_and_is_the_same_each_time(spoken):
    ratios = []
    for i, story in enumerate(demo.write_stories(6, 0)):
        text = " ".join(story.sentences)
        clean = espeak(text, *demo.SPEAKERS[i])[0]
        noisy, words = demo.record(text, i)
        assert np.array_equal(noisy, demo.record(text, i)[0]) and len(noisy) == len(clean)
        ratios.append(10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2)))
    low, high = demo.SIGNAL_TO_NOISE
    assert all(low - 0.1 < ratio < high + 0.1 for ratio in ratios) and max(ratios) - min(ratios) > 1


def test_demo_sets_fit_together(demo_folder):
    tokenizer = Tokenizer(demo_folder / "tokenizer.json")
    units = json.loads((demo_folder / "units" / "units.json").read_text())
    texts = {}
    for name in ("paired", "val", "test", "cloze"):
        opened = datasets.open_set(demo_folder / name, tokenizer.hash, units["hash"], full=True)
        texts[name] = [tokenizer.decode(opened.document(i)[0][:-1]) for i in range(opened.meta["documents"])]
    text = datasets.open_set(demo_folder / "text", tokenizer.hash, full=True)
    texts["text"] = tokenizer.decode(text.text).split("<|endoftext|>")[:-1]
    assert [len(texts[n]) for n in ("text", "paired", "val", "test")] == [120, 40, 12, 24]
    everything = [t for n in ("text", "paired", "val", "test") for t in texts[n]]
    assert len(set(everything)) == len(everything)  # no story in two sets
    for opening, ending, other in zip(*[iter(texts["cloze"])] * 3):
        assert opening + ending in texts["test"] and any(t.endswith(other) for t in texts["test"])
        assert opening.count(".") == 3 and ending.count(".") == 1 and ending != other


def test_demo_does_not_depend_on_the_workers(spoken, tmp_path):
    for workers in (1, 2):
        demo.make(str(tmp_path / f"{workers}"), text=60, train=12, val=4, test=8, n_units=20, workers=workers)
    for path in (tmp_path / "1").rglob("*.*"):
        if path.suffix in (".npy", ".wav") or path.name in ("tokenizer.json", "units.json"):
            assert (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes() == path.read_bytes(), path


def test_a_demo_is_reused_or_refused(demo_folder, tmp_path):
    same = dict(text=120, train=40, val=12, test=24, n_units=30)
    assert demo.make(str(demo_folder), **same)["counts"]["paired"]["stories"] == 40
    with pytest.raises(SystemExit, match="was made with another n_units"):
        demo.make(str(demo_folder), **same | dict(n_units=31))
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="is not a finished demo"):
        demo.make(str(tmp_path / "other"))
