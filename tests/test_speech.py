"""speech.py and corpora/demo.py: word times, units, and what the demo corpus promises."""
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import demo
from runtime import datasets
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak
from speech.mel import fit_mel_units, load_mel_units, mel_frames, save_mel_units
from speech.units import HOP, cheapest_path, collapse, word_units

TEXT = "Once there was a little dog. It was of the king, and ran into the barn."


@pytest.fixture(scope="module")
def spoken():
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install -e '.[speech]'")
    return espeak(TEXT)


def test_espeak_times_every_word(spoken):
    waveform, words = spoken
    assert waveform.dtype == np.float32 and 0.1 < np.abs(waveform).max() <= 1
    assert len(words) == len(TEXT.split())  # "of the" too, which espeak-ng says as one
    assert all(start < end for start, end in words)
    assert all(a[1] <= b[0] + 1e-3 for a, b in zip(words, words[1:]))
    assert words[-1][1] <= len(waveform) / SAMPLE_RATE
    pause = words[5][1], words[6][0]  # between the sentences
    assert pause[1] - pause[0] > 0.1
    silence = waveform[int(pause[0] * 16000) + 200:int(pause[1] * 16000) - 200]
    assert np.abs(silence).max() < 0.02


def test_espeak_is_a_pure_function(spoken):
    espeak("Something else before.", "en-us+m3", 210, 35)
    waveform, words = espeak(TEXT)
    assert np.array_equal(waveform, spoken[0]) and words == spoken[1]


def test_no_voice_of_the_demo_depends_on_the_clock(spoken):
    first = [espeak(TEXT, *speaker)[0] for speaker in demo.SPEAKERS]
    time.sleep(1.1)  # the clock that some voices draw noise from goes by seconds
    for speaker, waveform in zip(demo.SPEAKERS, first):
        assert np.array_equal(espeak(TEXT, *speaker)[0], waveform), speaker


def test_espeak_refuses_unknown_voices(spoken):
    with pytest.raises(ValueError, match="no voice 'xx-nobody'"):
        espeak("Hello", "xx-nobody")


@given(frames=st.lists(st.integers(0, 3), min_size=1, max_size=40),
       ends=st.lists(st.floats(0, 1.7), min_size=1, max_size=9).map(sorted))
@settings(max_examples=300, deadline=None)
def test_words_own_units_as_the_rule_says(frames, ends):
    ids, frame_start = collapse(frames)
    offsets = word_units(ends, frame_start, len(frames))
    owner = [sum(frame >= int(25 * end + 1e-6) for end in ends[:-1]) for frame in range(len(frames))]
    last_frame = [*(frame_start[1:] - 1), len(frames) - 1]  # a unit that straddles two words goes to the later one
    assert np.repeat(np.arange(len(ends)), np.diff(offsets)).tolist() == [owner[frame] for frame in last_frame]
    assert (offsets[0], offsets[-1]) == (0, len(ids))


def test_collapse():
    ids, starts = collapse([5, 5, 2, 2, 2, 5])
    assert ids.tolist() == [5, 2, 5] and starts.tolist() == [0, 2, 5]


@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_cheapest_path_is_the_cheapest(n, k, penalty, seed):
    from itertools import product
    n = min(n, 6)
    cost = np.random.default_rng(seed).random((n, k))

    def total(path):
        return sum(cost[t, s] for t, s in enumerate(path)) + penalty * sum(a != b for a, b in zip(path, path[1:]))
    found = cheapest_path(cost, penalty)
    assert total(found) == pytest.approx(min(map(total, product(range(k), repeat=n))))


def test_units_of_any_length(spoken):
    waveform, _ = spoken
    codebook = fit_mel_units([mel_frames(waveform)], 20, 0)
    ids, starts = codebook.encode([waveform])[0]
    assert len(ids) == len(starts) and ids.max() < 20
    assert (np.diff(starts) > 0).all() and (np.diff(ids.astype(int)) != 0).all()
    assert starts[-1] < len(waveform) // HOP
    louder = codebook.encode([waveform * 0.3])[0][0]
    assert np.array_equal(louder, ids)  # the level of a recording does not matter
    for n, units in ((0, 0), (639, 0), (640, 1), (16000, 1)):
        assert len(codebook.encode([np.zeros(n, np.float32)])[0][0]) == units


def test_codebook_round_trip_and_damage(spoken, tmp_path):
    codebook = fit_mel_units([mel_frames(spoken[0])], 20, 0)
    again = fit_mel_units([mel_frames(spoken[0])], 20, 0)
    assert np.array_equal(codebook.centroids, again.centroids)
    save_mel_units(tmp_path, codebook)
    loaded = load_mel_units(tmp_path)
    assert np.array_equal(loaded.centroids, codebook.centroids) and loaded[1:] == codebook[1:]
    np.save(tmp_path / "centroids.npy", codebook.centroids + 1)
    with pytest.raises(ValueError, match="does not fit the hash"):
        load_mel_units(tmp_path)


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


def test_the_hiss_is_as_loud_as_said_and_the_same_each_time(spoken):
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


def test_demo_does_not_depend_on_the_workers(demo_folder, tmp_path):
    again = tmp_path / "again"
    demo.make(str(again), text=120, train=40, val=12, test=24, n_units=30, workers=1)
    for path in demo_folder.rglob("*"):
        if path.is_file() and path.suffix in (".npy", ".wav") or path.name in ("tokenizer.json", "units.json"):
            assert (again / path.relative_to(demo_folder)).read_bytes() == path.read_bytes(), path


def test_a_demo_is_reused_or_refused(demo_folder, tmp_path):
    same = dict(text=120, train=40, val=12, test=24, n_units=30)
    assert demo.make(str(demo_folder), **same)["counts"]["paired"]["stories"] == 40
    with pytest.raises(SystemExit, match="was made with another n_units"):
        demo.make(str(demo_folder), **same | dict(n_units=31))
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="is not a finished demo"):
        demo.make(str(tmp_path / "other"))
