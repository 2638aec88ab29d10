"""What a transcript sounds like, word times from files, and word times from the waveform."""
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from corpora.swc import read_swc
from speech.align import MMS_LABELS, Aligner, align, ctc_paths, emissions, load_aligner
from speech.espeak import espeak
from speech.transcripts import SILENCES, match_words, spoken_form, unspeakable
from speech.units import word_units
from speech.word_times import read_ctm, read_textgrid, read_timed_json, read_wrd

pytest.importorskip("num2words")
pytest.importorskip("praatio")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
plain_words = st.lists(st.text(LETTERS, min_size=1, max_size=6).filter(lambda w: w not in SILENCES),
                       min_size=1, max_size=8)
gaps = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 900)), min_size=8, max_size=8)


def examples(number):
    return settings(max_examples=number, deadline=None)


def lay_out(words, gaps):
    """Timed words one after the other. gaps: (pause, length) of each in milliseconds, to be exact as text."""
    timed, clock = [], 0
    for word, (pause, length) in zip(words, gaps):
        timed.append((word, (clock + pause) / 1000, (clock + pause + length) / 1000))
        clock += pause + length
    return timed


# ---------------------------------------------------------------------------------------------------------------------
# transcripts

@pytest.mark.parametrize("word, spoken", [
    ("The", "the"), ("Well-known,", "well known"), ("--", ""), ("“…”", ""), ("café’s", "cafe's"), ("‘Tis", "tis"),
    ("_Œuvre_", "oeuvre"), ("ﬁn", "fin"), ("Straße", "strasse"), ("R&D", "r and d"), ("O’Neil’s", "o'neil's"),
    ("1984", "nineteen eighty four"), ("1905", "nineteen oh five"), ("2004", "two thousand and four"),
    ("21st", "twenty first"), ("$5", "five dollars"), ("$1", "one dollar"), ("£3.50,", "three pounds fifty"),
    ("€2.00", "two euros"), ("$1.5", "one point five dollars"), ("3.14", "three point one four"),
    ("1,000", "one thousand"), ("50%", "fifty percent"), ("10:30", "ten thirty"), (".5", "point five"),
    ("1,234,567.", "one million two hundred and thirty four thousand five hundred and sixty seven"),
    ("007", "zero zero seven"), ("B2B", "b two b"), ("4th-rate", "fourth rate"),
    ("1914–18", "nineteen fourteen eighteen"), ("1111111111111111", " ".join(["one"] * 16))])
def test_spoken_form(word, spoken):
    assert " ".join(spoken_form(word)) == spoken and unspeakable(word) == ""


@given(st.text(max_size=12))
@examples(200)
def test_spoken_form_of_any_text_is_words_that_are_their_own_spoken_form(word):
    spoken = spoken_form(word)
    assert all(re.fullmatch("[a-z]([a-z']*[a-z])?", w) for w in spoken)
    assert [spoken_form(w) for w in spoken] == [[w] for w in spoken]


@pytest.mark.parametrize("word, left", [
    ("это,", "это"), ("€", "€"), ("½", "½"), ("m²", "²"), ("x=y", "="), ("naïve", "")])
def test_unspeakable_names_what_cannot_be_spelled(word, left):
    assert unspeakable(word) == left


@given(st.lists(st.sampled_from(["The", "well-known", "--", "Dr.", "“O’Neil”", "x-y-z", "и", "..."]),
                min_size=1, max_size=10), st.data())
@examples(200)
def test_match_words_finds_the_spans_that_the_times_were_made_from(words, data):
    timed, wanted, clock = [], [], 0.0
    for word in words:
        forms = spoken_form(word) or (["и"] if word == "и" else [])
        if forms and data.draw(st.booleans()):
            forms = [word]  # as written, with its punctuation
        if forms and data.draw(st.integers(0, 5)) == 0:
            forms = ["<unk>"]
        begin = None
        for form in forms:
            if data.draw(st.booleans()):
                timed.append((data.draw(st.sampled_from([*sorted(SILENCES), "--"])), clock, clock + 1))
                clock += 1
            begin = clock if begin is None else begin
            timed.append((form, clock, clock + 0.5))
            clock += 0.5
        wanted.append((begin, clock) if forms else None)
    if not any(wanted):
        with pytest.raises(ValueError, match="does not match word times"):
            match_words(words, timed)
        return
    first = next(span[0] for span in wanted if span)
    for i, span in enumerate(wanted):
        wanted[i] = span or ((wanted[i - 1][1],) * 2 if i else (first, first))
    assert match_words(words, timed) == wanted


@given(plain_words, gaps, st.data())
@examples(100)
def test_a_missing_doubled_or_other_word_is_noticed(words, gaps, data):
    timed = lay_out(words, gaps)
    at = data.draw(st.integers(0, len(words) - 1))
    other = ("other" + timed[at][0], *timed[at][1:])
    for middle in ([], [timed[at]] * 2, [other]):
        with pytest.raises(ValueError, match="^transcript does not match word times: "):
            match_words(words, timed[:at] + middle + timed[at + 1:])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=9))
@examples(100)
def test_ends_never_decrease(times):
    timed = [("a", start / 10, (start + length) / 10) for start, length in times]
    spans = match_words(["a"] * len(timed), timed)
    ends = [end for _, end in spans]
    assert ends == list(itertools.accumulate([end for _, _, end in timed], max))
    assert all(start <= end for start, end in spans)
    word_units(ends, np.arange(250), 250)  # does not raise


@pytest.mark.parametrize("text, timed, message", [
    ("A Twenty one", [("a", 0, 1), ("twentyone", 1, 2)], "at word 2 'Twenty' the times have 'twentyone'"),
    ("a b c", [("a", 0, 1), ("b", 1, 2)], "at word 3 'c' the times end"),
    ("a", [("a", 0, 1), ("b", 1, 2)], "after the last word the times have 'b'"),
    ("well known", [("well-known", 0, 1)], "at word 1 'well' the times have 'well-known'"),  # one time is not shared
    ("a b", [("a", 0, 1), ("b", 1, 2.15)], "word 2 'b' lasts from 1.000 to 2.150 s of 2.100 s")])
def test_match_words_says_where_it_fails(text, timed, message):
    with pytest.raises(ValueError, match=message):
        match_words(text.split(), timed, duration=2.1)


def test_a_start_is_never_after_its_end():
    assert match_words(["a", "x-y"], [("a", 0, 1), ("x", 5, 6), ("y", 1, 2)]) == [(0, 1), (2, 2)]


def test_ends_up_to_a_frame_after_the_audio_are_cut():
    assert match_words(["a", "b"], [("a", 0, 1), ("b", 1, 2.03)], duration=2.0) == [(0, 1), (1, 2.0)]


# ---------------------------------------------------------------------------------------------------------------------
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


labels = st.lists(st.text(st.characters(blacklist_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=6)
                  | st.sampled_from(['"', 'say "so"', "<exists>", "1.5", "! no", "don't"]), min_size=1, max_size=8)


@given(labels, gaps, st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be"]), st.booleans(),
       st.booleans(), st.sampled_from([0, 0.5]), st.sampled_from(["words", "Word", "A - words"]))
@examples(100)
def test_textgrid_round_trip(tmp_path_factory, words, gaps, long, encoding, crlf, end_of_line, silence, tier):
    path = tmp_path_factory.getbasetemp() / "round.TextGrid"
    timed = lay_out([word.strip() for word in words], gaps)
    text = textgrid(timed, timed[-1][2] + silence, long, tier).replace("\n", "\r\n" if crlf else "\n")
    text = ("\ufeff" if encoding == "utf-16-be" else "") + (text if end_of_line else text.rstrip())
    path.write_bytes(text.encode(encoding))
    assert read_textgrid(path) == timed


@given(plain_words, gaps)
@examples(40)
def test_wrd_ctm_and_json_round_trips(tmp_path_factory, words, gaps):
    path = tmp_path_factory.getbasetemp() / "round"
    timed = lay_out(words, gaps)
    wanted = [(word, pytest.approx(start), pytest.approx(end)) for word, start, end in timed]

    path.write_text("".join(f"{round(start * 16000)} {round(end * 16000)} {word}\n" for word, start, end in timed))
    assert read_wrd(path) == wanted

    lines = [f"{name} 1 {a:.3f} {b - a:.3f} {word} 0.9\n" for word, a, b in timed for name in ("u1", "u2")]
    path.write_text(";; a comment\n" + "".join(lines))
    assert read_ctm(path) == {"u1": wanted, "u2": wanted}

    keyed = [dict(word=" " + word, start=start, end=end) for word, start, end in timed]
    texts = [dict(text=word, start=start, end=end) for word, start, end in timed]
    entries = [[start, end, word] for word, start, end in timed]
    for found in (keyed, texts, dict(words=keyed), dict(segments=[dict(words=keyed[:1]), dict(words=keyed[1:])]),
                  dict(tiers=dict(words=dict(entries=entries)))):
        path.write_text(json.dumps(found))
        assert read_timed_json(path) == timed


def test_timit_words_may_overlap(tmp_path):
    text = "\ufeff3050 5723 she\n5723 10337 had\n9190 11517 your\n12000 16334 dark\n"
    (tmp_path / "SA1.WRD").write_text(text, encoding="utf-8")
    spans = match_words("She had your dark".split(), read_wrd(tmp_path / "SA1.WRD"), duration=1.03)
    assert spans[0] == (3050 / 16000, 5723 / 16000)
    assert [end for _, end in spans] == [n / 16000 for n in (5723, 10337, 11517, 16334)]


GRID = textgrid([("a", 0.1, 0.5)], 1.0)


@pytest.mark.parametrize("read, text, message", [
    *[(read_wrd, text, "bad word times") for text in ("0 100", "100 0 a", "x 100 a", "-5 100 a", "nan 100 a")],
    *[(read_ctm, text, "bad word times") for text in (
        "u 1 0.0 0.5", "u 1 0.0 -0.5 a", "u 1 nan 0.5 a", "u 1 x 0.5 a", "u A 0 1 a\nu B 0 1 a")],
    *[(read_timed_json, text, "bad word times") for text in (
        "{", "3", "[" * 100_000, "[[1, 2]]", '{"words": null}', '[{"start": 0, "end": 1}]',
        '[{"word": "a", "start": 0}]', '[{"word": 3, "start": 0, "end": 1}]', '[{"word": "a", "start": NaN, "end": 1}]',
        '[{"word": "a", "start": true, "end": 1}]', '[{"word": "a", "start": 0, "end": 1' + "0" * 400 + "}]")],
    *[(read_textgrid, text, "bad TextGrid") for text in (
        "", "PK\x03\x04", '"' * 100_001, "[" * 100_000, '{"tiers": 1}', GRID[:-30], GRID.replace('"a"', '"a'))],
    (read_textgrid, GRID.replace("xmax = 0.5", "xmax = 0.05"), "bad word times"),
    (read_textgrid, GRID.replace("xmin = 0.5", "xmin = 0.4"), "bad word times"),  # overlaps
    (read_textgrid, GRID.partition("intervals [3]")[0], "bad TextGrid"),  # cut between two intervals
    (read_textgrid, GRID.replace('"words"', '"wrong"'), "no word tier"),
    (read_textgrid, GRID.replace('"phones"', '"WORDS"'), "no word tier"),  # which of the two?
    (read_textgrid, b"\xe9t\xe9", "unreadable word times"), (read_textgrid, None, "unreadable word times")])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, read, text, message):
    if text is not None:
        (tmp_path / "bad").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^{message}: .*/bad: ") as caught:
        read(tmp_path / "bad")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.fixture
def swc(tmp_path):
    """Write a text or bytes as an .swc and read it."""
    def read(content):
        (tmp_path / "a.swc").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_swc(tmp_path / "a.swc")
    return read


def test_swc(swc):
    extra, title, sentence, half, later = swc(SWC)
    assert extra.text == "You hear Radio, from the GNU."
    assert extra.words == [("You", 0.1, 0.2), ("hear", 0.2, 0.4), ("Radio,", 0.4, 0.9), ("from", 1.0, 1.2),
                           ("the", 1.2, 1.3), ("GNU.", 1.3, 1.65)]
    assert title[:2] == ("Early years", [("Early", 2.0, 2.5), ("years", 2.5, 2.9)])
    assert sentence.text == "It (v.) – 3 = x-ray."
    assert sentence.words == [("It", 3.0, 3.1), ("(v.)", 3.2, 3.5), ("3", 3.6, 4.0), ("=", 4.0, 4.1),
                              ("x-ray.", 4.1, 4.4)]
    assert half[:2] == ("Half GNU", None)
    assert later == ("Later.", [("Later.", 2.0, 2.5)], 1, 4)  # in the second file, 2 s from its beginning
    assert [s.paragraph for s in (extra, title, sentence, half)] == [0, 2, 3, 3]  # 1 is in what was not read
    assert [s.part for s in (extra, title, sentence, half)] == [0] * 4
    assert match_words(sentence.text.split(), sentence.words)[2] == (3.5, 3.5)  # the dash
    for segment in (extra, title, later):
        assert len(match_words(segment.text.split(), segment.words)) == len(segment.text.split())


@pytest.mark.parametrize("tokens, words", [
    ("<t>so</t>{0}", None),  # a word without <n>
    ("<t>so<n pronunciation='so'/></t>{0}", None),
    ("<t>so far</t>{0}", None),
    ("<t text='so far'><n pronunciation='so' start='1' end='2'/></t>{0}", None),  # which of the two words?
    ("<t>–</t> <t/>{0} <t>!</t>", [("it", 0.003, 0.004)]), ("<t>–</t>", None)])
def test_swc_sentences_with_a_word_that_has_no_times_have_none(swc, tokens, words):
    it = " <t>it<n pronunciation='it' start='3' end='4'/></t>"
    segment, = swc(f"<article><d><s>{tokens.format(it)}</s></d></article>")
    assert segment.words == words and segment.part == segment.paragraph == 0


DOUBLING = "".join(f'<!ENTITY e{i} "&e{i - 1};&e{i - 1};">' for i in range(1, 31))


@pytest.mark.parametrize("raw, message", [
    (f'<!DOCTYPE a [<!ENTITY e0 "ha">{DOUBLING}]><a>&e30;</a>', "bad swc"),  # two gigabytes, if it were expanded
    ('<!DOCTYPE a [<!ENTITY b SYSTEM "/etc/passwd">]><a><s><t>&b;</t></s></a>', "bad swc"),
    ("<article><d>", "bad swc"), ("<article>&c;</article>", "bad swc"),
    ('<article><d><s text="a b"><t text="c"/></s></d></article>', "bad swc"),
    ('<a><prop key="DC.source.audio.offset"/></a>', "bad swc"),
    ('<a><s><t>a<n pronunciation="a" start="x" end="1"/></t></s></a>', "bad word times"),
    ('<a><s><t>a<n pronunciation="a" start="1"/></t></s></a>', "bad word times")])
def test_a_bad_swc_is_refused(swc, raw, message):
    with pytest.raises(ValueError, match=f"^{message}: .*a.swc"):
        swc(raw)


# ---------------------------------------------------------------------------------------------------------------------
# the aligner

@given(st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 2), min_size=1, max_size=3)), min_size=1,
                max_size=3), st.booleans(), st.integers(0, 999))
@examples(40)
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


@given(st.lists(plain_words, min_size=1, max_size=4), st.integers(0, 999))
@examples(30)
def test_aligner_finds_planted_words_to_the_frame(utterances, seed):
    planted = [plant(words, seed + i) for i, words in enumerate(utterances)]
    texts = [" ".join(words).title() + " --" for words in utterances]
    found = align([waveform for waveform, _ in planted], texts, PLANTED, star=False)
    for spans, (_, wanted) in zip(found, planted):
        assert spans == [*wanted, (wanted[-1][1],) * 2]


@given(plain_words, st.integers(0, 999))
@examples(30)
def test_star_takes_in_what_was_said_but_not_written(words, seed):
    """It moves no end but the last, and no start but the first."""
    waveform, (_, *wanted, _) = plant(["''''", *words, "''''"], seed)
    spans, = align([waveform], [" ".join(words)], PLANTED)
    assert [end for _, end in spans[:-1]] == [end for _, end in wanted[:-1]]
    assert [start for start, _ in spans[1:]] == [start for start, _ in wanted[1:]]
    assert wanted[0][0].expected - 1e-6 <= spans[0][0] <= spans[-1][1] <= wanted[-1][1].expected + 1e-6


def test_long_audio_goes_through_the_model_in_windows():
    words = ["".join(np.random.default_rng(i).choice(list(LETTERS), 5)) for i in range(300)]
    waveform, wanted = plant(words, 0)
    assert len(waveform) > 65 * 16000
    shapes = []

    def model(input_values, attention_mask):
        shapes.append(input_values.shape)
        return planted_model(input_values, attention_mask)
    spans, = align([waveform], [" ".join(words)], PLANTED._replace(model=model), star=False)
    assert spans == wanted
    assert sum(n for n, _ in shapes) >= 3
    assert max(n for _, n in shapes) == 36 * 16000 + FIELD - HOP  # 30 s, and 3 s of context on either side


def test_what_cannot_be_aligned_is_returned_and_the_rest_goes_on(monkeypatch):
    waveform, wanted = plant(["good"], 0)
    cases = [("Это good", "word cannot be aligned: 'Это' in 'Это good'"), ("good €", "word cannot be aligned: '€'"),
             ("-- ...", "empty transcript"), ("good " * 50, "audio too short for its transcript")]
    texts = [text for text, _ in cases]
    found = align([waveform] * 4 + [waveform[:100], waveform], [*texts, "good", "good"], PLANTED, star=False)
    for error, reason in zip(found, [*(reason for _, reason in cases), "audio too short for its transcript: 0 frames"]):
        assert isinstance(error, ValueError) and str(error).startswith(reason)
    assert found[-1] == wanted
    broken = PLANTED._replace(model=lambda *x, **y: SimpleNamespace(logits=planted_model(*x, **y).logits * math.nan))
    assert str(align([waveform], ["good"], broken)[0]).startswith("alignment failed: ")
    monkeypatch.setattr("speech.align.MAX_POINTERS", 100)
    assert str(align([waveform], ["good"], PLANTED)[0]).startswith("audio too long to align: ")
    assert align([], [], PLANTED) == []


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
    assert (aligner.hop, aligner.field, aligner.blank) == (320, 400, 0)
    assert aligner.labels == {label: i for i, label in enumerate(MMS_LABELS) if i}
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
    assert together[3].std(0).max() > 0.1  # frames differ
    texts = ["a", "Hello there", "one", "Some more words", "And the last of them"]
    for spans, waveform, text in zip(align(waveforms, texts, aligner)[1:], waveforms[1:], texts[1:]):
        assert spans == [tuple(map(pytest.approx, s)) for s in align([waveform], [text], aligner)[0]]


def test_an_aligner_may_have_its_own_vocabulary_and_no_mask_embedding(tmp_path):
    write_aligner(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]  # used in training only
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    (tmp_path / "vocab.json").write_text('{"<blank>": 3, "<pad>": 0, "|": 1, "<unk>": 2, "A": 4, "B": 5}')
    aligner = load_aligner(tmp_path)
    assert aligner.labels == {"a": 4, "b": 5} and aligner.blank == 3
    error, = align([np.ones(16000, np.float32)], ["a bad cab"], aligner)
    assert str(error).startswith("word cannot be aligned: 'bad'")


FITS = "vocab.json does not fit the model's 28 columns"


@pytest.mark.parametrize("model, files, message", [
    (dict(feat_extract_norm="group"), {}, "feat_extract_norm is 'group'"),
    (dict(vocab_size=32), {}, "32 columns without a vocab.json"),
    ({}, {"vocab.json": dict(a=1, b=28, c=2)}, FITS), ({}, {"vocab.json": {"<pad>": 0}}, FITS),
    ({}, {"model.safetensors": "damaged"}, "not a Wav2Vec2ForCTC that can be loaded"),
    ({}, {"config.json": dict(vocab_size=32)}, "not have all of the model: .*lm_head"),
    ({}, {"config.json": dict(num_hidden_layers=3)}, "not have all of the model: .*layers.2"),
    ({}, {"config.json": dict(hidden_size=1 << 20)}, "a larger model than model.safetensors holds"),
    ({}, {"config.json": dict(num_hidden_layers=1 << 40)}, "a larger model than model.safetensors holds"),
    ({}, {"config.json": dict(conv_stride=[5, 2, 2, 2, 2, 2, 0])}, "conv_stride .* must be positive integers"),
    ({}, {"config.json": dict(model_type="hubert")}, "model_type is 'hubert', not 'wav2vec2'")])
def test_aligners_that_cannot_be_used_are_refused(tmp_path, model, files, message):
    """model: settings that the model is made with; files: what is then changed in its folder."""
    write_aligner(tmp_path, **model)
    for name, content in files.items():
        if name == "config.json":
            content = json.loads((tmp_path / name).read_text()) | content
        (tmp_path / name).write_text(json.dumps(content))
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
    errors = align([waveform] * 3 + [waveform[:1600]], ["The smoltolk", "Это", "--", text], aligner)
    assert [str(error).split(":")[0] for error in errors] == [
        "word cannot be aligned", "word cannot be aligned", "empty transcript", "alignment failed"]
