"""words.py: what a transcript sounds like, word times from files, and the CTC aligner."""
import itertools
import json
import math
import re
import shutil
import types

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

LETTERS = "abcdefghijklmnopqrstuvwxyz"
many = settings(max_examples=100, deadline=None)
plain_words = st.lists(st.text(LETTERS, min_size=1, max_size=6).filter(lambda w: w not in SILENCES),
                       min_size=1, max_size=8)
# milliseconds, so that a round trip through text is exact
gaps = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 900)), min_size=8, max_size=8)


def lay_out(words, gaps):
    """Timed words one after the other, (gap, length) in milliseconds."""
    timed, clock = [], 0
    for word, (gap, length) in zip(words, gaps):
        timed.append((word, (clock + gap) / 1000, (clock + gap + length) / 1000))
        clock += gap + length
    return timed


# spoken form

@pytest.mark.parametrize("word, spoken", [
    ("The", "the"), ("Well-known,", "well known"), ("--", ""), ("“…”", ""), ("café’s", "cafe's"), ("‘Tis", "tis"),
    ("_Œuvre_", "oeuvre"), ("ﬁn", "fin"), ("Straße", "strasse"), ("R&D", "r and d"), ("O’Neil’s", "o'neil's")])
def test_spoken_form_without_digits(word, spoken):
    assert " ".join(spoken_form(word)) == spoken and unspeakable(word) == ""


@pytest.mark.parametrize("word, spoken", [
    ("1984", "nineteen eighty four"), ("1905", "nineteen oh five"), ("2004", "two thousand and four"),
    ("21st", "twenty first"), ("$5", "five dollars"),
    ("$1", "one dollar"), ("£3.50,", "three pounds fifty"), ("€2.00", "two euros"), ("$1.5", "one point five dollars"),
    ("3.14", "three point one four"), ("1,000", "one thousand"), ("50%", "fifty percent"), ("10:30", "ten thirty"),
    ("1,234,567.", "one million two hundred and thirty four thousand five hundred and sixty seven"),
    (".5", "point five"), ("007", "zero zero seven"), ("B2B", "b two b"), ("4th-rate", "fourth rate"),
    ("1914–18", "nineteen fourteen eighteen"), ("1111111111111111", " ".join(["one"] * 16))])
def test_spoken_form_of_numbers(word, spoken):
    pytest.importorskip("num2words")
    assert " ".join(spoken_form(word)) == spoken and unspeakable(word) == ""


@given(st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_spoken_form_never_fails_and_stays_in_its_alphabet(word):
    pytest.importorskip("num2words")
    spoken = spoken_form(word)
    assert all(re.fullmatch("[a-z]([a-z']*[a-z])?", w) for w in spoken)
    assert [spoken_form(w) for w in spoken] == [[w] for w in spoken]


@pytest.mark.parametrize("word, left", [("это,", "это"), ("€", "€"), ("½", "½"), ("m²", "²"), ("x=y", "="),
                                        ("naïve", "")])
def test_what_cannot_be_spelled_is_named(word, left):
    assert unspeakable(word) == left


# written words and timed words

WRITTEN = ["The", "well-known", "--", "Dr.", "“O’Neil”", "x-y-z", "и", "..."]


@given(st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=10), gaps, st.data())
@settings(max_examples=200, deadline=None)
def test_match_words_finds_what_it_was_cut_from(words, _, data):
    """Oracle: the mapping is known, because the timed words are made from the written ones."""
    timed, wanted, clock = [], [], 0.0
    for word in words:
        forms = [["и"]] if word == "и" else [[form] for form in spoken_form(word)]
        if forms and data.draw(st.booleans()):
            forms = [[word]]  # as written, punctuation and all
        if forms and data.draw(st.integers(0, 5)) == 0:
            forms = [["<unk>"]]
        begin = clock
        for form in forms:
            if data.draw(st.booleans()):
                timed.append((data.draw(st.sampled_from(sorted(SILENCES) + ["--"])), clock, clock + 1))
                begin, clock = begin + (form is forms[0]), clock + 1
            timed.append((form[0], clock, clock + 0.5))
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
@many
def test_any_wrong_word_is_noticed(words, gaps, data):
    timed = lay_out(words, gaps)
    at = data.draw(st.integers(0, len(words) - 1))
    for wrong in (timed[:at] + timed[at + 1:], timed[:at] + [timed[at]] + timed[at:],
                  timed[:at] + [("other" + timed[at][0], *timed[at][1:])] + timed[at + 1:]):
        with pytest.raises(ValueError, match="^(transcript does not match word times): "):
            match_words(words, wrong)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=9))
@many
def test_ends_ascend_whatever_the_file_says(times):
    timed = [("a", start / 10, (start + length) / 10) for start, length in times]
    spans = match_words(["a"] * len(timed), timed)
    ends = [end for _, end in spans]
    assert ends == [max(end for _, _, end in timed[:i + 1]) for i in range(len(timed))]
    assert all(start <= end for start, end in spans)
    word_units(ends, np.arange(250), 250)  # does not raise


def test_match_words_says_where_it_fails():
    timed = [("a", 0, 1), ("twentyone", 1, 2), ("b", 2, 3)]
    with pytest.raises(ValueError, match="at word 2 'Twenty' the times have 'twentyone'"):
        match_words("A Twenty one b".split(), timed)
    with pytest.raises(ValueError, match="at word 3 'c' the times end"):
        match_words(["a", "b", "c"], [("a", 0, 1), ("b", 1, 2)])
    with pytest.raises(ValueError, match="behind the last word the times have 'b'"):
        match_words(["a"], [("a", 0, 1), ("b", 1, 2)])
    with pytest.raises(ValueError, match="at word 1 'well' the times have 'well-known'"):
        match_words(["well", "known"], [("well-known", 0, 1)])  # one time is not shared out


def test_word_times_must_lie_inside_the_audio():
    timed = [("a", 0, 1), ("b", 1, 2.03)]
    assert match_words(["a", "b"], timed, duration=2.0) == [(0, 1), (1, 2.0)]
    with pytest.raises(ValueError, match="^word times outside the audio: word 2 'b' lasts from .* to 2.030 s of 1.900"):
        match_words(["a", "b"], timed, duration=1.9)


# files

def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def textgrid(timed, end, long=True, tiers=("phones", "words")):
    """A TextGrid as Praat writes it; every tier but the last holds other labels."""
    out = ['File type = "ooTextFile"', 'Object class = "TextGrid"', ""]
    out += ["xmin = 0", f"xmax = {end}", "tiers? <exists>", f"size = {len(tiers)}", "item []:"] if long else \
        ["0", f"{end}", "<exists>", f"{len(tiers)}"]
    for number, name in enumerate(tiers, 1):
        rows, clock = [], 0
        for text, begin, stop in timed:
            rows += [("", clock, begin)] * (begin > clock) + [(text if number == len(tiers) else "AH0", begin, stop)]
            clock = stop
        rows += [("", clock, end)] * (end > clock)
        out += [f"    item [{number}]:", '        class = "IntervalTier"', f"        name = {quoted(name)}",
                "        xmin = 0", f"        xmax = {end}", f"        intervals: size = {len(rows)}"] if long else \
            ['"IntervalTier"', quoted(name), "0", f"{end}", f"{len(rows)}"]
        for i, (text, begin, stop) in enumerate(rows, 1):
            out += [f"        intervals [{i}]:", f"            xmin = {begin}", f"            xmax = {stop}",
                    f"            text = {quoted(text)}"] if long else [f"{begin}", f"{stop}", quoted(text)]
    return "\n".join(out) + "\n"


labels = st.lists(st.text(st.characters(blacklist_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=6)
                  | st.sampled_from(['"', 'say "so"', "<exists>", "1.5", "! no", "don't"]), min_size=1, max_size=8)


@given(labels, gaps, st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be"]), st.booleans())
@many
def test_textgrid_round_trip(tmp_path_factory, words, gaps, long, encoding, crlf):
    path = tmp_path_factory.getbasetemp() / "round.TextGrid"
    timed = lay_out([word.strip() for word in words], gaps)
    text = textgrid(timed, timed[-1][2] + 0.5, long)
    bom = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((bom + text.replace("\n", "\r\n" if crlf else "\n")).encode(encoding))
    assert read_textgrid(path) == timed


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
def test_textgrid_as_praatio_writes_it(tmp_path, form):
    pytest.importorskip("praatio")
    from praatio import textgrid as praat
    timed = [("don't", 0.25, 0.5), ('a "b"', 0.5, 1.125), ("<unk>", 1.5, 2.0)]
    grid = praat.Textgrid()
    grid.addTier(praat.PointTier("tones", [(0.3, "H*"), (1.0, "L%")], 0, 2.5))
    grid.addTier(praat.IntervalTier("phones", [(0, 0.25, "x")], 0, 2.5))
    grid.addTier(praat.IntervalTier("words", [(start, end, text) for text, start, end in timed], 0, 2.5))
    grid.save(str(tmp_path / "a.TextGrid"), format=form, includeBlankSpaces=True)
    assert read_textgrid(tmp_path / "a.TextGrid") == timed
    assert read_textgrid(tmp_path / "a.TextGrid", tier="phones") == [("x", 0, 0.25)]


@pytest.mark.parametrize("long", [True, False])
def test_praatio_reads_what_these_tests_write(tmp_path, long):
    pytest.importorskip("praatio")
    from praatio import textgrid as praat
    timed = [("the", 0.3, 0.5), ("cat", 0.5, 1.25)]
    (tmp_path / "b.TextGrid").write_text(textgrid(timed, 2.0, long))
    tier = praat.openTextgrid(str(tmp_path / "b.TextGrid"), includeEmptyIntervals=False).getTier("words")
    assert [(e.label, e.start, e.end) for e in tier.entries] == timed
    assert read_textgrid(tmp_path / "b.TextGrid") == timed


def test_bad_textgrids(tmp_path):
    path = tmp_path / "bad.TextGrid"
    good = textgrid([("a", 0.1, 0.5)], 1.0)
    for text, reason in [
            ("", "bad TextGrid"), ("PK\x03\x04", "bad TextGrid"), (good[:-30], "bad TextGrid"),
            (good.replace('"a"', '"a'), "bad TextGrid"), (good.replace("xmax = 0.5", "xmax = 0.05"), "bad word times"),
            (good.replace('"words"', '"wrong"'), "no word tier"), (good.replace('"phones"', '"WORDS"'), "no word tier"),
            (good.replace("size = 3", "size = 999999999"), "bad TextGrid"),
            (good.replace("IntervalTier", "Tier"), "bad TextGrid"),
            (good.replace("TextGrid", "PitchTier"), "bad TextGrid"), ('"' * 100_001, "bad TextGrid")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{reason}.*: .*bad.TextGrid"):
            read_textgrid(path)
    path.write_bytes(b"\xe9t\xe9 " + good.encode())
    with pytest.raises(ValueError, match="^unreadable word times: .*neither UTF-8 nor UTF-16"):
        read_textgrid(path)
    with pytest.raises(ValueError, match="^unreadable word times: .*No such file"):
        read_textgrid(tmp_path / "none")


@given(plain_words, gaps)
@settings(max_examples=40, deadline=None)
def test_wrd_ctm_and_json_round_trips(tmp_path_factory, words, gaps):
    path = tmp_path_factory.getbasetemp() / "round"
    timed = lay_out(words, gaps)

    path.write_text("".join(f"{round(start * 16000)} {round(end * 16000)} {word}\n" for word, start, end in timed))
    assert read_wrd(path) == [(word, pytest.approx(a), pytest.approx(b)) for word, a, b in timed]

    path.write_text(";; made by a test\n" + "".join(
        f"{name} 1 {start:.3f} {end - start:.3f} {word} 0.9\n" for word, start, end in timed for name in ("u1", "u2")))
    wanted = [(word, pytest.approx(a), pytest.approx(b)) for word, a, b in timed]
    assert read_ctm(path) == {"u1": wanted, "u2": wanted}

    keyed = [dict(word=" " + word, start=start, end=end) for word, start, end in timed]
    texts = [dict(text=word, start=start, end=end) for word, start, end in timed]
    for found in (keyed, texts, dict(words=keyed), dict(segments=[dict(words=keyed[:1]), dict(words=keyed[1:])]),
                  dict(tiers=dict(words=dict(entries=[[start, end, word] for word, start, end in timed])))):
        path.write_text(json.dumps(found))
        assert read_timed_json(path) == timed


def test_timit_words_overlap_and_leave_gaps(tmp_path):
    (tmp_path / "SA1.WRD").write_text("\ufeff3050 5723 she\n5723 10337 had\n9190 11517 your\n12000 16334 dark\n",
                                      encoding="utf-8")
    timed = read_wrd(tmp_path / "SA1.WRD")
    assert timed[0] == ("she", 3050 / 16000, 5723 / 16000)
    spans = match_words("She had your dark".split(), timed, duration=1.03)
    assert [end for _, end in spans] == [n / 16000 for n in (5723, 10337, 11517, 16334)]


@pytest.mark.parametrize("read, text", [
    (read_wrd, "0 100"), (read_wrd, "100 0 a"), (read_wrd, "x 100 a"),
    (read_wrd, "-5 100 a"), (read_ctm, "u 1 0.0 0.5"), (read_ctm, "u 1 0.0 -0.5 a"),
    (read_ctm, "u 1 nan 0.5 a"), (read_ctm, "u A 0 1 a\nu B 0 1 a"),
    (read_timed_json, "{"),
    (read_timed_json, "3"), (read_timed_json, '[{"start": 0, "end": 1}]'),
    (read_timed_json, "[" * 100_000), (read_timed_json, '[{"word": "a", "start": 0}]'),
    (read_timed_json, '[{"word": "a", "start": NaN, "end": 1}]'),
    (read_timed_json, "[[1, 2]]"),
    (read_timed_json, '[{"word": 3, "start": 0, "end": 1}]'),
    (read_timed_json, '{"words": null}'),
    (read_timed_json, '[{"word": "a", "start": 0, "end": Infinity}]'),
    (read_timed_json, '[{"word": "a", "start": 0, "end": 1' + "0" * 400 + "}]")])
def test_bad_times_are_one_clear_line(tmp_path, read, text):
    (tmp_path / "bad").write_text(text)
    with pytest.raises(ValueError, match="^bad word times: .*bad") as caught:
        read(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("speech.word_times.MAX_FILE", 1000)
    (tmp_path / "large").write_text("0 1 a\n" * 500)
    with pytest.raises(ValueError, match="^unreadable word times: .*large.*: more than"):
        read_wrd(tmp_path / "large")


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
    (tmp_path / "aligned.swc").write_text(SWC, encoding="utf-8")
    extra, title, sentence, half, later = read_swc(tmp_path / "aligned.swc")
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
    for segment in (extra, title, later):
        assert len(match_words(segment.text.split(), segment.words)) == len(segment.text.split())


@pytest.mark.parametrize("tokens, words", [
    ("<t>so</t>{0}", None),  # a word without <n>
    ("<t>so<n pronunciation='so'/></t>{0}", None),
    ("<t>so far</t>{0}", None),
    ("<t text='so far'><n pronunciation='so' start='1' end='2'/></t>{0}", None),  # which of the two words?
    ("<t>–</t> <t/>{0} <t>!</t>", [("it", 0.003, 0.004)]), ("<t>–</t>", None)])
def test_swc_sentences_with_a_word_that_has_no_times_have_none(tmp_path, tokens, words):
    it = " <t>it<n pronunciation='it' start='3' end='4'/></t>"
    (tmp_path / "aligned.swc").write_text(f"<article><d><s>{tokens.format(it)}</s></d></article>", encoding="utf-8")
    segment, = read_swc(tmp_path / "aligned.swc")
    assert segment.words == words and segment.part == segment.paragraph == 0


def test_swc_words_go_through_match_words(tmp_path):
    pytest.importorskip("num2words")
    (tmp_path / "aligned.swc").write_text(SWC, encoding="utf-8")
    sentence = read_swc(tmp_path / "aligned.swc")[2]
    spans = match_words(sentence.text.split(), sentence.words)
    assert spans == [(3.0, 3.1), (3.2, 3.5), (3.5, 3.5), (3.6, 4.0), (4.0, 4.1), (4.1, 4.4)]


def test_swc_takes_no_entities_and_no_nonsense(tmp_path):
    path = tmp_path / "bad.swc"
    laughs = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><article><d>&c;</d></article>'
    for raw, reason in [(laughs.encode(), "unsafe xml"), (laughs.encode("utf-16"), "unsafe xml"),
                        (b"<article><d>", "bad swc"), (b"<article>&c;</article>", "bad swc"),
                        (b'<article><d><s text="a b"><t text="c"/></s></d></article>', "bad swc"),
                        (b'<a><s><t>a<n pronunciation="a" start="x" end="1"/></t></s></a>', "bad word times"),
                        (b'<a><s><t>a<n pronunciation="a" start="1"/></t></s></a>', "bad word times"),
                        (b'<a><prop key="DC.source.audio.offset"/></a>', "bad swc")]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"^{reason}: .*bad.swc"):
            read_swc(path)


# the aligner

@given(st.integers(1, 7), st.lists(st.integers(0, 2), min_size=1, max_size=3), st.booleans(), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_ctc_path_is_the_best_of_all(n_frames, tokens, star, seed):
    """Oracle: all labellings of the frames that collapse to the target, columns 0-2 letters, 3 blank, 4 star."""
    blank, target = 3, [4] * star + tokens + [4] * star
    rng = np.random.default_rng(seed)
    log_probs = np.log(rng.dirichlet(np.full(4, 0.5), n_frames) + 1e-9)
    log_probs = np.concatenate([log_probs, np.zeros((n_frames, 1))], 1)
    best = -math.inf
    for labels in itertools.product(range(5) if star else range(4), repeat=n_frames):
        if [label for label, _ in itertools.groupby(labels) if label != blank] == target:
            best = max(best, log_probs[range(n_frames), labels].sum())
    n_needed = len(target) + sum(a == b for a, b in zip(target, target[1:]))
    assert (best > -math.inf) == (n_frames >= n_needed)
    if best > -math.inf:
        (path, total), = ctc_paths([torch.tensor(log_probs)], [target], blank)
        labels = [target[state // 2] if state % 2 else blank for state in path]
        assert total == pytest.approx(best) == pytest.approx(log_probs[range(n_frames), labels].sum())
        assert [label for label, _ in itertools.groupby(labels) if label != blank] == target
        assert (np.diff(path) >= 0).all() and path[0] in (0, 1) and path[-1] >= 2 * len(target) - 1


@given(st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 4), min_size=1, max_size=9)),
                min_size=2, max_size=5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_ctc_paths_of_a_batch_are_those_of_its_members(shapes, seed):
    torch.manual_seed(seed)
    targets = [target for _, target in shapes]
    log_probs = [torch.randn(2 * len(target) + extra, 5).log_softmax(-1) for extra, target in shapes]
    together = ctc_paths(log_probs, targets, 0)
    for rows, target, (path, total) in zip(log_probs, targets, together):
        (alone, total_alone), = ctc_paths([rows], [target], 0)
        assert np.array_equal(path, alone) and total == pytest.approx(total_alone)


HOP, FIELD = 320, 400
COLUMNS = {label: i for i, label in enumerate(MMS_LABELS)}


def write_columns(columns):
    """A waveform whose frame t says columns[t]: that many ripples, of mean zero so that normalising keeps them."""
    waveform = np.zeros(len(columns) * HOP + FIELD - HOP, np.float32)
    for t, column in enumerate(columns):
        waveform[t * HOP:t * HOP + 2 * (column + 1)] = np.tile([0.1, -0.1], column + 1)
    return waveform


def planted_model(input_values, attention_mask):
    """Logits that are 10 at the column that write_columns wrote and 0 elsewhere."""
    n_frames = (input_values.shape[1] - FIELD) // HOP + 1
    frames = input_values[:, :n_frames * HOP].unflatten(1, (n_frames, HOP))
    columns = (frames.abs() > frames.abs().amax((1, 2), keepdim=True) / 2).sum(-1) // 2 - 1
    return types.SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(columns.clamp(min=0), len(COLUMNS)))


PLANTED = Aligner(planted_model, {k: v for k, v in COLUMNS.items() if v}, 0, HOP, FIELD, "cpu")


def plant(words, rng):
    """(columns of frames, (first, last + 1) frame of each word): letters of 1 to 3 frames, blanks between some."""
    columns, spans = [0] * int(rng.integers(0, 9)), []
    for word in words:
        first = len(columns)
        for i, letter in enumerate(word):
            if i and (rng.random() < 0.4 or letter == word[i - 1]):
                columns += [0] * int(rng.integers(1, 4))
            columns += [COLUMNS[letter]] * int(rng.integers(1, 4))
        spans.append((first, len(columns)))
        columns += [0] * int(rng.integers(1, 6))
    return columns, spans


def seconds(spans, waveform, n_frames):
    return [(pytest.approx(a * len(waveform) / n_frames / 16000), pytest.approx(b * len(waveform) / n_frames / 16000))
            for a, b in spans]


@given(st.lists(plain_words, min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_aligner_finds_planted_words_to_the_frame(utterances, seed):
    rng = np.random.default_rng(seed)
    planted = [plant(words, rng) for words in utterances]
    waveforms = [write_columns(columns) for columns, _ in planted]
    texts = [" ".join(words).title() + " --" for words in utterances]
    found = align(waveforms, texts, PLANTED, star=False)
    for spans, waveform, (columns, wanted) in zip(found, waveforms, planted):
        assert spans == seconds(wanted + [wanted[-1][1:] * 2], waveform, len(columns))

    # the star takes in what was said but not written, and moves no end but the last
    noise = 6 * [COLUMNS["'"], 0]
    spoiled = [write_columns(noise + columns + noise) for columns, _ in planted]
    for spans, waveform, (columns, wanted) in zip(align(spoiled, texts, PLANTED), spoiled, planted):
        wanted = seconds([(a + 12, b + 12) for a, b in wanted], waveform, len(columns) + 24)
        assert [end for _, end in spans[:-2]] == [end for _, end in wanted[:-1]]
        assert [start for start, _ in spans[1:-1]] == [start for start, _ in wanted[1:]]
        assert wanted[0][0].expected - 1e-6 <= spans[0][0] <= spans[-1][1] <= wanted[-1][1].expected + 1e-6


def test_long_audio_goes_through_in_windows():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(LETTERS), 5)) for _ in range(300)]
    columns, wanted = plant(words, rng)
    waveform = write_columns(columns)
    assert len(waveform) > 65 * 16000
    shapes = []

    def model(input_values, attention_mask):
        shapes.append(input_values.shape)
        return planted_model(input_values, attention_mask)
    spans, = align([waveform], [" ".join(words)], PLANTED._replace(model=model), star=False)
    assert spans == seconds(wanted, waveform, len(columns))
    assert sum(b for b, _ in shapes) >= 3  # of at most 30 s, which see 3 s on each side
    assert max(n for _, n in shapes) == 36 * 16000 + FIELD - HOP


def test_what_cannot_be_aligned_is_returned_and_the_rest_goes_on(monkeypatch):
    columns, wanted = plant(["good"], np.random.default_rng(0))
    waveform = write_columns(columns)
    broken = waveform.copy()
    broken[7] = np.nan
    waveforms = [waveform, waveform, waveform, waveform[:100], waveform, broken, waveform]
    texts = ["Это good", "good €", "-- ...", "good", "good " * 50, "good", "good"]
    found = align(waveforms, texts, PLANTED, star=False)
    for error, reason in zip(found, ["word cannot be aligned: 'Это' in 'Это good'", "word cannot be aligned: '€'",
                                     "empty transcript", "audio too short for its transcript: 0 frames",
                                     "audio too short for its transcript", "audio is not finite"]):
        assert isinstance(error, ValueError) and str(error).startswith(reason)
    assert found[-1] == seconds(wanted, waveform, len(columns))
    monkeypatch.setattr("speech.align.MAX_POINTERS", 100)
    error, = align([waveform], ["good"], PLANTED)
    assert str(error).startswith("audio too long to align: ")
    with pytest.raises(ValueError):
        align([waveform], [], PLANTED)
    assert align([], [], PLANTED) == []


def test_broken_models_are_noticed():
    columns, _ = plant(["good"], np.random.default_rng(0))
    model = PLANTED._replace(model=lambda x, attention_mask: types.SimpleNamespace(
        logits=planted_model(x, attention_mask).logits * math.nan))
    error, = align([write_columns(columns)], ["good"], model)
    assert str(error).startswith("alignment failed: ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a small Wav2Vec2ForCTC of MMS's kind, with random weights that make a difference."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=28, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=[16] * 7, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    model = transformers.Wav2Vec2ForCTC(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    folder = tmp_path_factory.mktemp("aligner")
    model.save_pretrained(folder)
    return folder


def test_batches_and_padding_change_nothing(tiny):
    aligner = load_aligner(tiny)
    assert (aligner.hop, aligner.field, aligner.blank) == (320, 400, 0)
    assert aligner.labels == {label: i for i, label in enumerate(MMS_LABELS) if i}
    rng = np.random.default_rng(0)
    lengths = [400, 16000, 7777, 25000, 30001]
    waveforms = [rng.normal(0.3, 0.1 * (i + 1), n).astype(np.float32) for i, n in enumerate(lengths)]
    together = emissions(waveforms, aligner)
    assert [len(rows) for rows in together] == [(n - 400) // 320 + 1 for n in lengths]
    for waveform, rows in zip(waveforms, together):
        alone, = emissions([waveform], aligner)
        assert torch.allclose(rows, alone, atol=1e-4)
        # independent of the batching: transformers on the normalised waveform as it is, with no mask
        normal = (waveform - waveform.mean(dtype=np.float64)) / np.sqrt(waveform.var(dtype=np.float64) + 1e-5)
        with torch.no_grad():
            direct = aligner.model(torch.tensor(normal, dtype=torch.float32)[None]).logits[0].log_softmax(-1)
        assert torch.allclose(rows, direct, atol=1e-4)
    assert together[3].std(0).max() > 0.1  # the weights do make a difference between frames
    texts = ["a", "Hello there", "one", "Some more words", "And the last of them"]
    for spans, waveform, text in zip(align(waveforms, texts, aligner)[1:], waveforms[1:], texts[1:]):
        assert spans == [tuple(map(pytest.approx, s)) for s in align([waveform], [text], aligner)[0]]


def test_vocabulary_of_the_folder_and_broken_folders(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "with")
    vocabulary = {"<blank>": 3, "<pad>": 0, "|": 1, "<unk>": 2, "A": 4, "B": 5}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    aligner = load_aligner(folder)
    assert aligner.labels == {"a": 4, "b": 5} and aligner.blank == 3
    error, = align([np.ones(16000, np.float32)], ["a bad cab"], aligner)
    assert str(error).startswith("word cannot be aligned: 'bad'")
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"C": 28}))
    with pytest.raises(ValueError, match="vocab.json does not fit the model's 28 columns"):
        load_aligner(folder)
    with pytest.raises(ValueError, match="no Wav2Vec2ForCTC"):
        load_aligner(tmp_path / "nothing")
    (folder / "vocab.json").unlink()
    weights = load_file(folder / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]  # for training only
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    assert load_aligner(folder).labels["a"] == 1
    config = json.loads((folder / "config.json").read_text())
    for change, message in [(dict(vocab_size=32), "not have all of the model: .*lm_head"),
                            (dict(num_hidden_layers=3), "not have all of the model: .*layers.2")]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_aligner(folder)
    (folder / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no Wav2Vec2ForCTC"):
        load_aligner(folder)


def test_an_aligner_that_padding_would_change_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, conv_dim=[8] * 7,
                                         intermediate_size=16, num_conv_pos_embedding_groups=2)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="feat_extract_norm is 'group'"):
        load_aligner(tmp_path)
    config.feat_extract_norm = "layer"
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="32 columns without a vocab.json; MMS has 28"):
        load_aligner(tmp_path)


# pocketsphinx

def test_pocketsphinx_agrees_with_the_synthesiser():
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    text = "The little dog, who was very old -- ran into the garden."
    waveform, spoken = espeak(text.replace("-- ", ""))
    aligner = load_aligner("pocketsphinx")
    found, = align([waveform], [text], aligner)
    assert len(found) == len(text.split())
    dash = text.split().index("--")
    assert found[dash] == (found[dash - 1][1],) * 2
    errors = [abs(a[1] - b[1]) for a, b in zip(found[:dash] + found[dash + 1:], spoken)]
    assert np.median(errors) < 0.03 and max(errors) < 0.15
    errors = align([waveform] * 3, ["The smoltolk", "Это", "--"], aligner)
    assert [str(error).split(":")[0] for error in errors] == ["word cannot be aligned"] * 2 + ["empty transcript"]
    error, = align([waveform[:1600]], [text], aligner)
    assert str(error).startswith("alignment failed: ")
