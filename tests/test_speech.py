"""espeak, word units, mel units and their sound, the command of speech/, and the demo corpus."""
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from corpora import demo
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech import mel
from speech.__main__ import main
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak
from speech.mel import fit_mel_units, load_mel_units, log_mel, mel_frames, save_mel_units, voice
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


def test_espeak_times_every_word(spoken):
    waveform, words = espeak(TEXT)
    assert waveform.dtype == np.float32 and 0.1 < np.abs(waveform).max() <= 1
    assert len(words) == len(TEXT.split())  # "of the" too, which espeak-ng says as one
    assert all(start < end for start, end in words)
    assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(words))
    assert words[-1][1] <= len(waveform) / SAMPLE_RATE
    assert espeak(TEXT)[1] == words and np.array_equal(espeak(TEXT)[0], waveform)
    start, end = words[5][1], words[6][0]  # the pause between the sentences
    assert end - start > 0.1 and np.abs(waveform[int(start * 16000) + 200:int(end * 16000) - 200]).max() < 0.02


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


@pytest.mark.parametrize("penalty", [0, 0.1, 0.2, 0.4, 3])
def test_cheapest_path_is_the_cheapest_of_all(penalty):
    def total(path):
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return sum(cost[t, state] for t, state in enumerate(path)) + penalty * changes

    for cost in np.random.default_rng(0).random((10, 6, 3)):
        best = min(map(total, itertools.product(range(3), repeat=6)))
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
    (dict(kind="hubert"), "kind is 'hubert', not 'mel'"), (dict(features={}), "not mel units of this version"),
    (dict(n_units=61), "units.json says 61"), (dict(hash="0"), "does not fit the hash"),
    (dict(penalty=None), "must be finite numbers")])
def test_damaged_mel_units_are_refused(spoken, tmp_path, changes, message):
    save_mel_units(tmp_path, spoken[1])
    about = json.loads((tmp_path / "units.json").read_text())
    (tmp_path / "units.json").write_text(json.dumps(about | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_mel_units(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def distance(a, b):
    """Mel-cepstral distance in dB. The spectra are smoothed, and each loses its mean over the recording."""
    a, b = (dct(log_mel(waveform), norm="ortho")[:, 1:mel.N_CEPSTRUM] for waveform in (a, b))
    difference = (a - a.mean(0)) - (b - b.mean(0))
    return 10 / np.log(10) * np.sqrt((difference**2).sum(1) / mel.N_MEL).mean()


def test_griffin_lim_gives_the_spectrum_it_was_given(spoken):
    waveform = spoken[0][0]
    energy = np.exp(log_mel(waveform))
    magnitude = mel.mel_to_magnitude(energy)
    assert magnitude.min() >= 0
    back = np.log(magnitude.astype(np.float64)**2 @ mel.mel_matrix() + 1e-12)
    assert np.abs(10 / np.log(10) * (back - np.log(energy))).mean() < 0.5
    again = mel.griffin_lim(magnitude)
    assert again.dtype == np.float32 and len(again) == len(waveform) // HOP * HOP
    assert distance(waveform, again) < min(1, distance(waveform, mel.griffin_lim(magnitude, momentum=0)))
    assert np.array_equal(again, mel.griffin_lim(magnitude))
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
        for unit, run in itertools.groupby(mel.frame_units(mel_frames(waveform), codebook).tolist()):
            runs.setdefault(unit, []).append(len(list(run)))
    assert len(codebook.durations) == 60 and len(runs) > 40
    for unit, duration in enumerate(codebook.durations):
        assert duration == pytest.approx(np.mean(runs.get(unit, [1])), abs=1e-3)
    [(ids, _)] = codebook.encode(waveforms[:1])
    assert len(resynthesise(ids.tolist(), codebook)) == HOP * round(sum(codebook.durations[i] for i in ids))
    with pytest.raises(ValueError, match="integers from 0 to 59"):
        resynthesise([60], codebook)


def test_the_command_gives_units_and_speaks_them(spoken, tmp_path, capsys):
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


# the demo corpus

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
