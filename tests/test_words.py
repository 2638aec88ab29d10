"""What a transcript sounds like, word times from files, and word times from the waveform."""
import itertools
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.swc import read_swc
from speech.align import MMS_LABELS, Aligner, align, ctc_paths, emissions, load_aligner
from speech.espeak import espeak
from speech.transcripts import assign_units, match_words, spoken_form
from speech.word_times import read_ctm, read_textgrid, read_timed_json, read_wrd

pytest.importorskip("num2words")
pytest.importorskip("praatio")

# transcripts

@pytest.mark.parametrize("word, spoken", [
    ("Well-known,", "well known"), ("--", ""), ("café’s", "cafe's"), ("‘Tis", "tis"), ("_Œuvre_", "oeuvre"),
    ("R&D", "r and d"), ("1984", "nineteen eighty four"), ("2004", "two thousand and four"), ("21st", "twenty first"),
    ("$5", "five dollars"), ("$1", "one dollar"), ("£3.50,", "three pounds fifty"), ("€2.00", "two euros"),
    ("$1.5", "one point five dollars"), ("3.14", "three point one four"), ("50%", "fifty percent"), ("B2B", "b two b"),
    ("1,234", "one thousand two hundred and thirty four"), ("007", "zero zero seven"), ("10:30", "ten thirty")])
def test_spoken_form(word, spoken):
    assert " ".join(spoken_form(word)) == spoken


def test_match_words_finds_the_span_of_each_written_word():
    """A word is spelled in two parts, as written, unknown, not spoken, or in another alphabet. Pauses are skipped."""
    words = "-- Well-known “Dr.” O’Neil -- и".split()
    timed = [("sil", 0, 1), ("well", 1, 2), ("", 2, 3), ("known", 3, 4), ("dr.", 4, 5), ("<unk>", 6, 7), ("и", 7, 8.03)]
    spans = [(1, 1), (1, 4), (4, 5), (6, 7), (7, 7), (7, 8.03)]
    assert match_words(words, timed) == spans
    assert match_words(words, timed, duration=8.0) == spans[:-1] + [(7, 8.0)]  # up to a frame too long
    overlapping = [("a", 0, 3), ("b", 1, 2.98), ("x", 2.5, 4), ("y", 3, 4)]  # as in TIMIT, and rounded
    assert match_words(["a", "b", "x-y"], overlapping) == [(0, 3), (1, 3), (2.5, 4)]
    assert match_words(["1234567890"], [("1234567890", 0, 15)]) == [(0, 15)]


@pytest.mark.parametrize("text, timed, message", [
    ("A Twenty one", [("a", 0, 1), ("twentyone", 1, 2)], "at word 2 'Twenty' the times have 'twentyone'"),
    ("a b c", [("a", 0, 1), ("b", 1, 2)], "at word 3 'c' the times end"),
    ("a", [("a", 0, 1), ("b", 1, 2)], "after the last word the times have 'b'"),
    ("well known", [("well-known", 0, 1)], "at word 1 'well' the times have 'well-known'"),  # one time is not shared
    ("a b", [("a", 0, 1), ("b", 1, 2.15)], "word 2 'b' lasts from 1.000 to 2.150 s of 2.100 s")])
def test_match_words_says_where_it_fails(text, timed, message):
    with pytest.raises(ValueError, match=message):
        match_words(text.split(), timed, duration=2.1)


def even(n):
    """Times of n words of 0.3 s each."""
    return [(0.3 * i, 0.3 * i + 0.3) for i in range(n)]


@pytest.mark.parametrize("spans, message", [
    ([(0, 0.3), (0.3, 2.0), *even(6)[2:]], "word 3 .* the word before it"),         # the second word ends late
    ([(0, 0.3), (0.6, 0.9), (0.3, 0.6), *even(6)[3:]], "word 3 .* the word before it"),   # two are swapped
    ([(0, 0.06), (0.12, 0.18), (0.06, 0.12)], "word 3 .* the word before it"),      # two short ones
    ([(0.3, 0.6), (0.0, 0.7), *even(6)[2:]], "word 2 .* the word before it"),       # the second begins too early
    ([(0, 0)] * 6, "6 of 6 words"), ([(0, 0)] * 2, "2 of 2 words"), ([(0, 0)], "1 of 1 words"),
    ([(2.0, 2.0)] * 6, "6 of 6 words"), ([(0, 3e-5), (3e-5, 6e-5)], "2 of 2 words"),  # seconds taken for samples
    ([*even(1), *[(0.3, 0.31)] * 5], "5 of 6 words"),
    ([(0, 298.0), *[(298 + a, 298 + b) for a, b in even(5)]], "word 1 .* lasts from 0.000 to 298.000 s"),
    ([(-0.1, 0.3), *even(6)[1:]], "word 1 .* -0.100"), ([*even(5), (1.5, 300.1)], "word 6 .* of 300.000 s")])
def test_times_that_cannot_be_a_reading_are_refused(spans, message):
    """The recording has a new unit every 40 ms, and lasts 300 s where it must."""
    words, seconds = "one two three four five six".split()[:len(spans)], 300.0 if spans[-1][1] > 2 else 2.0
    n_frames = int(25 * seconds)
    with pytest.raises(ValueError, match=f"(impossible word times|word times outside the audio): .*{message}"):
        times = match_words(words, [(word, *span) for word, span in zip(words, spans)], seconds)
        assign_units(words, times, np.arange(n_frames), n_frames, 25)


def test_the_parts_of_a_word_are_in_order():
    with pytest.raises(ValueError, match="impossible word times: the parts of word 1 'twenty-one' are not in order"):
        match_words(["twenty-one", "men"], [("twenty", 0.4, 0.7), ("one", 0, 0.4), ("men", 0.7, 1)])


def test_pauses_and_unknown_words_of_several_aligners():
    timed = [("SIL", 0, 0.1), ("she", 0.1, 0.3), ("[noise]", 0.3, 0.5), ("<UNK>", 0.5, 0.7), ("<eps>", 0.7, 0.8)]
    assert match_words(["She", "smiles."], timed) == [(0.1, 0.3), (0.5, 0.7)]


def test_units_need_no_reading_of_numbers(monkeypatch):
    """Text that espeak-ng has spoken comes with its times, and num2words may not be installed."""
    monkeypatch.setitem(sys.modules, "num2words", None)
    assert assign_units(["at", "9"], [(0, 0.4), (0.4, 0.8)], np.arange(20), 20, 25).tolist() == [0, 10, 20]


def test_half_of_the_words_may_be_without_units():
    words, times = "one -- two -- three four".split(), [(0, 0.3), (0.3, 0.3), (0.3, 0.31), (0.31, 0.31), (0.31, 0.33),
                                                        (0.33, 0.9)]
    assert assign_units(words, times, np.arange(25), 25, 25).tolist() == [0, 7, 7, 7, 7, 8, 25]


# files with word times

def textgrid(timed, end, long=True, tier="words"):
    """A TextGrid as Praat writes it: a tier of points, a tier of phones, and the timed words with the pauses."""
    words, clock = [], 0
    for text, begin, stop in timed:
        words += [("", clock, begin)] * (begin > clock) + [(text, begin, stop)]
        clock = stop
    words += [("", clock, end)] * (end > clock)
    lines = ["xmin = 0", f"xmax = {end}", "tiers? <exists>", "size = 3", "item []:",
             "item [1]:", 'class = "TextTier"', 'name = "tones"', "xmin = 0", f"xmax = {end}", "points: size = 1",
             "points [1]:", "number = 0.1", 'mark = "H ""x"""']
    for number, name, rows in ((2, "phones", [("AH0", 0, end)]), (3, tier, words)):
        lines += [f"item [{number}]:", 'class = "IntervalTier"', f'name = "{name}"', "xmin = 0", f"xmax = {end}",
                  f"intervals: size = {len(rows)}"]
        for i, (text, begin, stop) in enumerate(rows, 1):
            doubled = text.replace('"', '""')
            lines += [f"intervals [{i}]:", f"xmin = {begin}", f"xmax = {stop}", f'text = "{doubled}"']
    if not long:  # the short format has only the values
        lines = [re.sub(r"^.*? = |^tiers\? ", "", line) for line in lines if not line.endswith(":")]
    return "\n".join(['File type = "ooTextFile"', 'Object class = "TextGrid"', "", *lines, ""])


TIMED = [("She's", 0.1, 0.5), ('"so"', 0.5, 0.75), ("été", 1.0, 1.25), ("<exists>", 1.25, 1.5)]


@pytest.mark.parametrize("long, encoding, newline, end, tier", [
    (True, "utf-8", "\n", 1.5, "words"), (False, "utf-8-sig", "\r\n", 2.0, "Word"),
    (True, "utf-16", "\n", 2.0, "A - words")])
def test_textgrids_of_each_form_are_read(tmp_path, long, encoding, newline, end, tier):
    text = textgrid(TIMED, end, long, tier).replace("\n", newline).rstrip()
    (tmp_path / "a.TextGrid").write_bytes(text.encode(encoding))
    assert read_textgrid(tmp_path / "a.TextGrid") == TIMED


def test_wrd_and_ctm_are_read(tmp_path):
    """In TIMIT's .WRD words may overlap."""
    (tmp_path / "SA1.WRD").write_text("\ufeff3050 5723 she\n5723 10337 had\n9190 11517 your\n", encoding="utf-8")
    wanted = [("she", 3050 / 16000, 5723 / 16000), ("had", 5723 / 16000, 10337 / 16000)]
    assert read_wrd(tmp_path / "SA1.WRD") == [*wanted, ("your", 9190 / 16000, 11517 / 16000)]
    (tmp_path / "a.ctm").write_text(";; a comment\nu1 1 0.5 0.25 she 0.9\nu2 1 0 0.5 who\nu1 1 0.75 0.5 had 0.9\n")
    assert read_ctm(tmp_path / "a.ctm") == {"u1": [("she", 0.5, 0.75), ("had", 0.75, 1.25)], "u2": [("who", 0, 0.5)]}


def test_each_form_of_json_is_read(tmp_path):
    keyed = [dict(word=" " + word, start=start, end=end) for word, start, end in TIMED]
    texts = [dict(text=word, start=start, end=end) for word, start, end in TIMED]
    entries = [[start, end, word] for word, start, end in TIMED]
    for found in (keyed, texts, dict(words=keyed), dict(segments=[dict(words=keyed[:1]), dict(words=keyed[1:])]),
                  dict(tiers=dict(words=dict(entries=entries)))):
        (tmp_path / "a.json").write_text(json.dumps(found))
        assert read_timed_json(tmp_path / "a.json") == TIMED


GRID = textgrid([("a", 0.1, 0.5)], 1.0)
DOUBLING = "".join(f'<!ENTITY e{i} "&e{i - 1};&e{i - 1};">' for i in range(1, 31))


@pytest.mark.parametrize("read, text, message", [
    (read_wrd, "100 0 a", "bad word times"), (read_wrd, "nan 100 a", "bad word times"),
    (read_ctm, "u 1 0.0 -0.5 a", "bad word times"), (read_ctm, "u A 0 1 a\nu B 0 1 a", "bad word times"),
    (read_timed_json, '[{"start": 0, "end": 1}]', "bad word times"),
    (read_timed_json, '[{"word": "a", "start": true, "end": 1}]', "bad word times"),
    (read_textgrid, GRID.replace("xmax = 0.5", "xmax = 0.05"), "bad word times"),
    (read_textgrid, GRID.replace("xmin = 0.5", "xmin = 0.4"), "bad word times"),  # overlaps
    (read_textgrid, GRID.partition("intervals [3]")[0], "bad TextGrid"),  # cut between two intervals
    (read_textgrid, GRID.replace('"phones"', '"WORDS"'), "no word tier"),  # which of the two?
    (read_textgrid, "\ud800", "unreadable word times"),
    (read_swc, f'<!DOCTYPE a [<!ENTITY e0 "ha">{DOUBLING}]><a>&e30;</a>', "bad swc"),  # two gigabytes when expanded
    (read_swc, '<!DOCTYPE a [<!ENTITY b SYSTEM "/etc/passwd">]><a><s><t>&b;</t></s></a>', "bad swc"),
    (read_swc, '<article><d><s text="a b"><t text="c"/></s></d></article>', "bad swc"),
    (read_swc, '<a><s><t>a<n pronunciation="a" start="1"/></t></s></a>', "bad word times")])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, read, text, message):
    (tmp_path / "bad").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=f"^{message}: .*/bad: ") as caught:
        read(tmp_path / "bad")
    assert "\n" not in str(caught.value)


# the Spoken Wikipedia Corpora

# The layout of swc-1.0: texts in attributes (what the reader says before the article) or inline (the article),
# spoken words <n> with or without times, phones, headings, parts that are not read, audio in two files.
SWC = """<?xml version="1.0" encoding="UTF-8"?>
<article><meta><prop key="DC.title" value="Radio" /><prop key="DC.source.audio.offset" value="10.0" group="audio2" />
<prop key="DC.source.audio.offset" value="0.0" group="audio1" /></meta><d><extra text="You hear Radio, from
the GNU."><s text="You hear  Radio, from &#10;the GNU."><t text="You"><n pronunciation="You" start="100" end="200" />
</t><t text="hear"><n pronunciation="hear" start="200" end="400" /></t><t text="Radio"><n pronunciation="Radio"
start="400" end="900" /></t><t text="," /><t text="from"><n pronunciation="from" start="1000" end="1200" /></t>
<t text="the"><n pronunciation="the" start="1200" end="1300" /></t><t text="GNU">
<n pronunciation="G" start="1300" end="1400" />
<n pronunciation="N" start="1400" end="1500" /><n pronunciation="U" start="1500" end="1650" /></t><t text="." /></s>
</extra><ignored><p><s><t>Not<n pronunciation="Not" start="1" end="2" /></t> <t>read<n pronunciation="read" /></t>
</s></p></ignored>
<section level="2"><sectiontitle><t>Early<n pronunciation="Early" start="2000" end="2500" /></t>
 <t>years<n pronunciation="years" start="2500" end="2900" /></t></sectiontitle>
<sectioncontent><p><s><t>It<n pronunciation="It" start="3000" end="3100"><ph start="3000" end="3050" type="I"></ph></n>
</t> <t>(</t><t>v.<n pronunciation="versus" start="3200" end="3500" /></t><t>)</t> <t>–<n pronunciation="–" /></t>
 <t>3<n pronunciation="three" start="3600" end="4000" /></t> <t>=<n pronunciation="is" start="4000" end="4100" /></t>
 <t>x-ray<n pronunciation="x" start="4100" end="4200" /><n pronunciation="ray" start="4200" end="4400" /></t><t>.</t>
</s> <s><t>Half<n pronunciation="Half" start="5000" end="5200" /></t> <t>GNU<n pronunciation="G" start="5200"
end="5300" /><n pronunciation="N" /></t></s></p>
<p><s><t>Later<n pronunciation="Later" start="12000" end="12500" /></t><t>.</t></s></p></sectioncontent></section></d>
</article>
"""


def test_swc(tmp_path):
    (tmp_path / "a.swc").write_text(SWC)
    extra, title, sentence, half, later = read_swc(tmp_path / "a.swc")
    assert extra.text == "You hear Radio, from the GNU."
    assert extra.words == [("You", 0.1, 0.2), ("hear", 0.2, 0.4), ("Radio,", 0.4, 0.9), ("from", 1.0, 1.2),
                           ("the", 1.2, 1.3), ("GNU.", 1.3, 1.65)]
    assert title[:2] == ("Early years", [("Early", 2.0, 2.5), ("years", 2.5, 2.9)])
    assert sentence.text == "It (v.) – 3 = x-ray."
    assert sentence.words == [("It", 3.0, 3.1), ("(v.)", 3.2, 3.5), ("3", 3.6, 4.0), ("=", 4.0, 4.1),
                              ("x-ray.", 4.1, 4.4)]
    assert half[:2] == ("Half GNU", None)
    assert later == ("Later.", [("Later.", 2.0, 2.5)], 1, 4)  # in the second file, 2 s from its beginning
    places = [(s.part, s.paragraph) for s in (extra, title, sentence, half)]
    assert places == [(0, 0), (0, 2), (0, 3), (0, 3)]  # paragraph 1 is not read aloud


# the aligner

@given(st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 2), min_size=1, max_size=3)), min_size=1,
                max_size=3), st.booleans(), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_each_ctc_path_of_a_batch_is_the_best_of_all(shapes, star, seed):
    """Brute force over all labellings of the frames. The columns are three letters, the blank and the star."""
    rng, blank, batch = np.random.default_rng(seed), 3, []

    def collapse(labels):
        return [label for label, _ in itertools.groupby(labels) if label != blank]
    for n_frames, tokens in shapes:
        target = [4] * star + tokens + [4] * star
        log_probs = np.log(rng.dirichlet(np.full(4, 0.5), n_frames) + 1e-9)
        log_probs = np.concatenate([log_probs, np.zeros((n_frames, 1))], 1)
        labellings = itertools.product(range(5 if star else 4), repeat=n_frames)
        totals = [log_probs[range(n_frames), labels].sum() for labels in labellings if collapse(labels) == target]
        assert bool(totals) == (n_frames >= len(target) + sum(a == b for a, b in zip(target, target[1:])))
        if totals:
            batch.append((target, log_probs, max(totals)))
    if not batch:
        return
    targets = [[-1 if column == 4 else column for column in target] for target, _, _ in batch]
    paths = ctc_paths([torch.tensor(log_probs) for _, log_probs, _ in batch], targets, blank)
    for (target, log_probs, best), (path, total) in zip(batch, paths, strict=True):
        labels = [target[state // 2] if state % 2 else blank for state in path]
        assert total == pytest.approx(best) == pytest.approx(log_probs[range(len(path)), labels].sum())
        assert collapse(labels) == target
        assert (np.diff(path) >= 0).all() and path[0] in (0, 1) and path[-1] >= 2 * len(target) - 1


HOP, FIELD = 320, 400
COLUMNS = {label: i for i, label in enumerate(MMS_LABELS)}


def write_columns(columns):
    """A waveform whose frame t stands for columns[t], as so many ripples of mean zero."""
    waveform = np.zeros(len(columns) * HOP + FIELD - HOP, np.float32)
    for t, column in enumerate(columns):
        waveform[t * HOP:t * HOP + 2 * (column + 1)] = np.tile([0.1, -0.1], column + 1)
    return waveform


def planted_model(input_values, attention_mask):
    """Logits that are 10 at the column that write_columns wrote and 0 elsewhere."""
    n_frames = (input_values.shape[1] - FIELD) // HOP + 1
    frames = input_values[:, :n_frames * HOP].unflatten(1, (n_frames, HOP))
    columns = (frames.abs() > frames.abs().amax((1, 2), keepdim=True) / 2).sum(-1) // 2 - 1
    return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(columns.clamp(min=0), len(COLUMNS)))


PLANTED = Aligner(planted_model, {k: v for k, v in COLUMNS.items() if v}, 0, HOP, FIELD, "cpu")


def plant(words, seed):
    """(waveform, [(start, end) of each word in seconds]): letters of 1 to 3 frames, blanks between some of them."""
    rng = np.random.default_rng(seed)
    columns, spans = [0] * int(rng.integers(0, 9)), []
    for word in words:
        first = len(columns)
        for i, letter in enumerate(word):
            if i and (rng.random() < 0.4 or letter == word[i - 1]):
                columns += [0] * int(rng.integers(1, 4))
            columns += [COLUMNS[letter]] * int(rng.integers(1, 4))
        spans.append((first, len(columns)))
        columns += [0] * int(rng.integers(1, 6))
    waveform = write_columns(columns)
    step = len(waveform) / len(columns) / 16000
    return waveform, [tuple(pytest.approx(frame * step) for frame in span) for span in spans]


@given(st.lists(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6), min_size=1, max_size=8),
                min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_aligner_finds_planted_words_to_the_frame(utterances, seed):
    planted = [plant(words, seed + i) for i, words in enumerate(utterances)]
    texts = [" ".join(words).title() + " --" for words in utterances]
    found = align([waveform for waveform, _ in planted], texts, PLANTED, star=False)
    for spans, (_, wanted) in zip(found, planted):
        assert spans == [*wanted, (wanted[-1][1],) * 2]


def test_star_takes_in_what_was_said_but_not_written():
    """The speech before and after the transcript sounds like its first and last word."""
    waveform, (_, *wanted, _) = plant(["so", "some", "words", "here", "re"], 0)
    spans, = align([waveform], ["some words here"], PLANTED)
    assert [end for _, end in spans[:-1]] == [end for _, end in wanted[:-1]]
    assert [start for start, _ in spans[1:]] == [start for start, _ in wanted[1:]]
    assert wanted[0][0].expected - 1e-6 <= spans[0][0] <= spans[-1][1] <= wanted[-1][1].expected + 1e-6


def test_long_audio_goes_through_the_model_in_windows():
    words = ["".join(np.random.default_rng(i).choice(list("abcdefghij"), 5)) for i in range(300)]
    waveform, wanted = plant(words, 0)
    shapes = []

    def model(input_values, attention_mask):
        shapes.append(input_values.shape)
        return planted_model(input_values, attention_mask)
    spans, = align([waveform], [" ".join(words)], PLANTED._replace(model=model), star=False)
    assert spans == wanted
    assert max(n for _, n in shapes) == 36 * 16000 + FIELD - HOP  # 30 s, and 3 s of context on either side


def test_what_cannot_be_aligned_is_returned_and_the_rest_goes_on():
    waveform, wanted = plant(["good"], 0)
    *errors, last = align([waveform] * 4, ["Это good", "-- ...", "good " * 50, "good"], PLANTED, star=False)
    assert [str(error).partition(":")[0] for error in errors] == [
        "word cannot be aligned", "empty transcript", "audio too short for its transcript"]
    assert last == wanted


def write_aligner(folder, **changes):
    """Write a small Wav2Vec2ForCTC of MMS's kind, with random weights large enough to tell frames apart."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(vocab_size=28, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                  conv_dim=[16] * 7, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
                  num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**config | changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    model.save_pretrained(folder)


def test_batches_and_padding_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("speech.align.BATCH_SECONDS", 2)
    monkeypatch.setattr("speech.align.BATCH_POINTERS", 8000)  # two of the utterances below
    write_aligner(tmp_path)
    aligner = load_aligner(tmp_path)
    assert aligner.labels == {label: i for i, label in enumerate(MMS_LABELS) if i} and aligner.blank == 0
    rng = np.random.default_rng(0)
    lengths = [400, 16000, 7777, 25000, 30001]
    waveforms = [rng.normal(0.3, 0.1 * (i + 1), n).astype(np.float32) for i, n in enumerate(lengths)]
    together = emissions(waveforms, aligner)
    assert [len(rows) for rows in together] == [(n - 400) // 320 + 1 for n in lengths]
    for waveform, rows in zip(waveforms, together):
        # transformers alone: the waveform normalised with numpy, no batch and no mask
        normal = (waveform - waveform.mean(dtype=np.float64)) / np.sqrt(waveform.var(dtype=np.float64) + 1e-5)
        with torch.no_grad():
            direct = aligner.model(torch.tensor(normal, dtype=torch.float32)[None]).logits[0].log_softmax(-1)
        assert torch.allclose(rows, direct, atol=1e-4)
    texts = ["a", "Hello there", "one", "Some more words", "And the last of them"]
    for spans, waveform, text in zip(align(waveforms, texts, aligner)[1:], waveforms[1:], texts[1:]):
        assert spans == [tuple(map(pytest.approx, s)) for s in align([waveform], [text], aligner)[0]]


@pytest.mark.parametrize("model, changes, message", [
    (dict(feat_extract_norm="group"), {}, "feat_extract_norm is 'group'"),
    (dict(vocab_size=32), {}, "32 columns without a vocab.json"),
    ({}, dict(num_hidden_layers=3), "not have all of the model: .*layers.2"),
    ({}, dict(hidden_size=1 << 20), "a larger model than model.safetensors holds"),
    ({}, dict(model_type="hubert"), "model_type is 'hubert', not 'wav2vec2'")])
def test_aligners_that_cannot_be_used_are_refused(tmp_path, model, changes, message):
    """model: settings that the model is made with; changes: what its config.json says instead."""
    write_aligner(tmp_path, **model)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | changes))
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{message}") as caught:
        load_aligner(tmp_path)
    assert "\n" not in str(caught.value)


def test_pocketsphinx_agrees_with_the_synthesiser():
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    text = "The little dog, who was very old -- ran into the garden."
    waveform, spoken = espeak(text.replace("-- ", ""))
    aligner = load_aligner("pocketsphinx")
    found, = align([waveform], [text], aligner)
    dash = text.split().index("--")
    assert found.pop(dash) == (found[dash - 1][1],) * 2
    errors = [abs(a[1] - b[1]) for a, b in zip(found, spoken, strict=True)]
    assert np.median(errors) < 0.03 and max(errors) < 0.15
    unknown, failed = align([waveform, waveform[:1600]], ["The smoltolk", text], aligner)
    assert str(unknown).startswith("word cannot be aligned") and str(failed).startswith("alignment failed")
