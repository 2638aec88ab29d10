"""
When each word of a transcript is spoken.

What a transcript sounds like, word times out of the files that corpora ship (TIMIT's .WRD, TextGrid, ctm, json, the
Spoken Wikipedia's swc), and word times from the waveform by forced alignment, with MMS's wav2vec 2.0 or pocketsphinx.

    times = read_textgrid("clip.TextGrid")                   # [(text, start, end), ...] in seconds
    spans = match_words(transcript.split(), times)           # [(start, end), ...] of each word as written
    [spans] = align([waveform], [transcript], load_aligner("weights/mms-aligner"))

Nothing is guessed: a word that cannot be found raises a ValueError "REASON: details", and its utterance is left out.
"""
import codecs
import math
import os
import re
import reprlib
import unicodedata
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from runtime.files import one_line, parse_json, read_bytes, read_json
from speech import SAMPLE_RATE, UNIT_RATE, check_size, frame_geometry

# ---------------------------------------------------------------------------------------------------------------------
# Word times: what a transcript sounds like
#
# A timed word is (text, start, end), in seconds. A transcript is text.split(), as written, with case and punctuation.
# Transcript and times are compared in spoken form: lower-case words over a-z and the apostrophe.

FOLD = str.maketrans({
    "æ": "ae", "œ": "oe", "ø": "o", "ß": "ss", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i",  # no accents to drop
    "’": "'", "‘": "'", "ʼ": "'", "ʻ": "'", "′": "'", "´": "'", "`": "'", "＇": "'",
    "&": " and ", "%": " percent ", "+": " plus ", "@": " at ", "−": " minus "})
CURRENCY = {"$": "dollar", "£": "pound", "€": "euro", "¥": "yen"}
AMOUNT = re.compile(r"([$£€¥])?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?:(st|nd|rd|th)(?![a-z])|([$£€¥]))?")
SAID = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Sc", "Sm", "So"}  # categories other than marks, punctuation
SILENCES = {"", "<eps>", "sp", "sil", "<sil>"}  # tokens in time files that are no words
UNKNOWN = "<unk>"  # the Montreal Forced Aligner's word that its dictionary lacks


def fold(word):
    """Lower case without accents, ligatures or typographic apostrophes; '&', '%', '+', '@' and '−' as words."""
    letters = (unicodedata.normalize("NFKD", c) if c.isalpha() else c
               for c in unicodedata.normalize("NFC", word).lower().translate(FOLD))  # ½ and ² stay: nobody says 1/2, 2
    return "".join(c for c in "".join(letters).lower().translate(FOLD) if unicodedata.category(c)[0] != "M")


def say_amount(match):
    """A number out of AMOUNT as words, in num2words' English: 'one hundred and one'."""
    try:
        from num2words import num2words
    except ImportError:
        raise RuntimeError("num2words is missing: pip install 'smoltolk[speech]'") from None

    def cardinal(digits):
        apart = len(digits) > 15 or len(digits) > 1 and digits[0] == "0"  # a telephone number, an agent
        return " ".join(num2words(int(d)) for d in digits) if apart else num2words(int(digits))

    before, number, ordinal, after = match.groups()
    if re.fullmatch("1[1-9][0-9][0-9]", number) and not (before or ordinal or after):  # most likely a year
        return f" {num2words(int(number), to='year')} "
    whole, _, decimals = number.replace(",", "").partition(".")
    if ordinal and not decimals and len(whole) <= 15:
        return f" {num2words(int(whole), to='ordinal')} "
    point = " point " + " ".join(num2words(int(d)) for d in decimals) if decimals else ""
    said = cardinal(whole) if whole else ""
    currency = CURRENCY.get(before or after, "")
    if currency:
        currency += "" if currency == "yen" or number == "1" else "s"
        if len(decimals) == 2:
            return f" {said or 'zero'} {currency} {cardinal(decimals) if decimals != '00' else ''} "
    return f" {said}{point} {currency} {ordinal or ''} "


def spoken_form(word):
    """
    The words over a-z and ' that a written word is spoken as: "Well-known" -> [well, known], "21st" -> [twenty, first],
    "$3.50" -> [three, dollars, fifty], "café's" -> [cafe's], "--" -> [].

    Numbers are read as cardinals, from 1100 to 1999 as years ("1984" -> nineteen eighty four), digit by digit with a
    leading zero, behind the point or if there are more than 15. Raises RuntimeError if a digit needs num2words
    and it is not installed. What cannot be spelled is left out: see unspeakable.
    """
    if word.isascii() and word.isalpha():
        return [word.lower()]
    text = AMOUNT.sub(say_amount, fold(word))
    return [w for w in (w.strip("'") for w in re.findall("[a-z']+", text)) if w]


def unspeakable(word):
    """What is said but left out of spoken_form: letters, digits and signs it cannot spell ("это" of "это,"); or ""."""
    if word.isascii() and word.isalpha():
        return ""
    rest = AMOUNT.sub(" ", fold(word))
    return "".join(c for c in rest if not "a" <= c <= "z" and unicodedata.category(c) in SAID)


def comparable(word):
    """spoken_form, but a word that it cannot spell in full as written, less punctuation, to be found literally."""
    if unspeakable(word):
        return ["".join(c for c in fold(word) if unicodedata.category(c) in SAID)]
    return spoken_form(word)


def match_words(words, timed, duration=None):
    """
    The span of each written word, [(start, end), ...] in seconds.

    words: text.split(); timed: [(text, start, end), ...] in order; duration: of the audio in seconds, if known.
    A written word owns all timed words that it is spoken as ("well-known"); <unk> stands for any one written word; a
    written word that is not spoken ("--") gets no time at the end of the word before it (or the start of the first).
    Only ends matter to word_units, so they are made to ascend: an end before that of an earlier word is raised to it,
    and a start is never behind its end. Ends up to one unit frame beyond the audio are cut to it.
    Raises ValueError "transcript does not match word times: ..." (nothing is guessed, one timed word is never shared
    out among several written ones) and "word times outside the audio: ...".
    """
    entries = []  # (spoken word, start, end, timed text); a timed word of several spoken ones has its end at the last
    for text, start, end in timed:
        forms = [] if text in SILENCES else [UNKNOWN] if text == UNKNOWN else comparable(text)
        for i, form in enumerate(forms):
            entries.append((form, start, end if i == len(forms) - 1 else None, text))
    spans, position = [], 0
    for number, word in enumerate(words, 1):
        forms = comparable(word)
        if not forms:
            spans.append(None)
            continue
        some = position < len(entries)
        taken = entries[position:position + (1 if some and entries[position][0] == UNKNOWN else len(forms))]
        same = [entry[0] for entry in taken] in (forms, [UNKNOWN])
        if not same or taken[-1][2] is None:  # the latter: a part of that timed word is left for the next
            there = " ".join(dict.fromkeys(entry[3] for entry in taken)) if some else None
            raise ValueError(f"transcript does not match word times: at word {number} {word[:60]!r} the times "
                             + (f"have {there[:60]!r}" if some else "end"))
        spans.append((taken[0][1], taken[-1][2]))
        position += len(taken)
    if position < len(entries) or not any(spans):
        there = f"the times have {entries[position][3][:60]!r}" if position < len(entries) else "nothing is timed"
        raise ValueError(f"transcript does not match word times: behind the last word {there}")
    spans = fill_spans(spans)
    if duration is not None:
        for number, span in enumerate(spans):
            if span[1] > duration + 1 / UNIT_RATE or span[0] < -1 / UNIT_RATE:
                raise ValueError(f"word times outside the audio: word {number + 1} {words[number][:60]!r} lasts from "
                                 f"{span[0]:.3f} to {span[1]:.3f} s of {duration:.3f} s")
        spans = [tuple(min(max(time, 0.0), duration) for time in span) for span in spans]
    return spans


def fill_spans(spans):
    """Spans with ascending ends; None becomes no time at the end of the span before (or the start of the first)."""
    filled, latest = [], next(span[0] for span in spans if span)
    for span in spans:
        start, end = span or (latest, latest)
        latest = max(latest, end)
        filled.append((min(start, latest), latest))
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# Word times from files that a corpus ships. Whatever is wrong with a file is a ValueError "REASON: details".

TOUCHING = 0.001  # seconds; intervals of a tier follow one another, but for rounding
MAX_DEPTH = 100  # of elements in elements of swc, which has about 10
MAX_FILE = 1 << 26  # bytes; an hour of speech with phones is about 5 MB of TextGrid


def read_text(path):
    """A text file in UTF-8 or, with a byte order mark, UTF-16."""
    try:
        raw = read_bytes(path, MAX_FILE)
    except ValueError as error:
        raise ValueError(f"unreadable word times: {error}") from None
    try:
        return raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"unreadable word times: {path}: neither UTF-8 nor UTF-16") from None


# What Praat takes for a number; float() also takes nan, inf, 1_0 and other scripts' digits.
NUMBER = re.compile(r"[-+]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?")


def timed_word(text, start, end, path, rate=1):
    """(text, start, end) in seconds out of times in 1 / rate seconds, checked."""
    try:
        seconds = [float(t) / rate for t in (start, end) if type(t) in (int, float) or NUMBER.fullmatch(t)]
        if isinstance(text, str) and len(seconds) == 2 and 0 <= seconds[0] <= seconds[1] < math.inf:
            return text.strip(), *seconds
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"bad word times: {path}: {reprlib.repr(text)} from {reprlib.repr(start)} to {reprlib.repr(end)}")


def read_wrd(path, sample_rate=SAMPLE_RATE):
    """Timed words of TIMIT's .WRD: a line 'BEGIN END word' each, in samples at `sample_rate`."""
    timed = []
    for line in read_text(path).splitlines():
        if line.strip():
            begin, end, word = (line.split(maxsplit=2) + [None, None, None])[:3]
            timed.append(timed_word(word, begin, end, path, sample_rate))
    return timed


def read_ctm(path):
    """NIST's ctm, 'utterance channel start duration word [confidence]' a line: {utterance: [timed words]}."""
    utterances, channels = {}, {}
    for line in read_text(path).splitlines():
        fields = line.split()
        if not fields or line.startswith(";;"):
            continue
        try:
            utterance, channel, start, duration, word = fields[:5]
            if not NUMBER.fullmatch(start) or not NUMBER.fullmatch(duration):
                raise ValueError
            start, end = float(start), float(start) + float(duration)
        except ValueError:
            raise ValueError(f"bad word times: {path}: not a line of ctm: {line[:60]!r}") from None
        if channels.setdefault(utterance, channel) != channel:
            raise ValueError(f"bad word times: {path}: {utterance[:60]} has more than one channel")
        utterances.setdefault(utterance, []).append(timed_word(word, start, end, path))
    return utterances


def read_timed_json(path):
    """
    Timed words of a json file: [{"word" or "text", "start", "end"}, ...], the same under "words" or, as Whisper has it,
    in each of "segments", or the entries [start, end, word] under "tiers" "words" of the Montreal Forced Aligner.
    """
    text = read_text(path)
    try:
        found = parse_json(text, path, list, dict)
        if isinstance(found, dict) and "tiers" in found:
            rows = [(word, start, end) for start, end, word in found["tiers"]["words"]["entries"]]
        else:
            parts = [found] if isinstance(found, list) else [part["words"] for part in found.get("segments", [found])]
            rows = [(word.get("word", word.get("text")), word["start"], word["end"]) for part in parts for word in part]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bad word times: {path}: no json of words with times ({one_line(error)[:60]})") from None
    return [timed_word(*row, path) for row in rows]


# What Praat reads of a text file, long or short: strings, flags and numbers that stand alone; the rest is for people.
# Possessive, so that a file of nothing but quotes takes linear time.
PRAAT_TOKEN = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"|(<[a-z]++>)|![^\n]*+|(\S++)')


def read_textgrid(path, tier=None):
    """
    Timed words of a Praat TextGrid, long or short text format, without the empty intervals.

    tier: name of the interval tier; by default the one tier called words, word or "SPEAKER - words" (in any case).
    Format: Praat manual, "TextGrid file formats".
    """
    tokens = []
    for match in PRAAT_TOKEN.finditer(read_text(path)):
        string, flag, other = match.groups()
        if string is not None:
            tokens.append(string.replace('""', '"'))
        elif flag or other and NUMBER.fullmatch(other):
            tokens.append(flag if flag else float(other))
        elif other and other[0] == '"':
            raise ValueError(f"bad TextGrid: {path}: a string without its end")
    tokens = iter(tokens)

    def take(kind):
        token = next(tokens, None)
        if not isinstance(token, kind):
            raise ValueError(f"bad TextGrid: {path}: {reprlib.repr(token)} where a {kind.__name__} should be")
        return token

    def count():
        number = take(float)
        if not number.is_integer() or number < 0:
            raise ValueError(f"bad TextGrid: {path}: {number:g} where a number of things should be")
        return int(number)

    header = [take(str), take(str), take(float), take(float), take(str)]
    if header[0] not in ("ooTextFile", "ooTextFile short") or header[1] != "TextGrid" or header[4] != "<exists>":
        raise ValueError(f"bad TextGrid: {path}: no TextGrid with tiers")
    names, chosen = [], []
    for _ in range(count()):
        kind, name, _, _, size = take(str), take(str), take(float), take(float), count()
        if kind not in ("IntervalTier", "TextTier"):
            raise ValueError(f"bad TextGrid: {path}: unknown kind of tier {reprlib.repr(kind)}")
        rows = [[take(t) for t in ((float, float, str) if kind == "IntervalTier" else (float, str))]
                for _ in range(size)]
        names.append(name)
        wanted = name == tier if tier else name.lower() in ("words", "word") or name.lower().endswith("- words")
        if wanted and kind == "IntervalTier":
            chosen.append(rows)
    if (token := next(tokens, None)) is not None:
        raise ValueError(f"bad TextGrid: {path}: {reprlib.repr(token)} behind the last tier")
    if len(chosen) != 1:
        names = reprlib.repr(names)
        raise ValueError(f"no word tier: {path}: {len(chosen)} tiers fit {tier or 'words'!r} among {names}")
    timed = [timed_word(text, start, end, path) for start, end, text in chosen[0]]
    if back := [b for a, b in zip(timed, timed[1:]) if b[1] < a[2] - TOUCHING]:
        raise ValueError(f"bad word times: {path}: {back[0][0][:60]!r} begins before the end of the interval before it")
    return [word for word in timed if word[0]]


class Segment(NamedTuple):
    text: str  # a sentence or a heading as written, single spaces between words
    words: list | None  # timed words, one for each of text.split() that is spoken; None if one of them has no times
    part: int  # which of the article's audio files, from 0, the times refer to
    paragraph: int  # number of its paragraph or heading in the article


def read_swc(path):
    """
    Sentences and headings of aligned.swc of the Spoken Wikipedia Corpora that the corpus takes for spoken: [Segment].

    An article read in several files (audio1.ogg, audio2.ogg, ...) has times that run on across them; here they count
    from the beginning of part `part`. Layout: swc-1.0, Baumann, Koehn and Hennig, 2019.
    """
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities may be files, or grow without bounds
        raise ValueError(f"unsafe xml: {path}: declares a document type or entities")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"bad swc: {path}: {one_line(error)}") from None
    layer = [root]
    for _ in range(MAX_DEPTH):
        layer = [inner for element in layer for inner in element]
    if layer:
        raise ValueError(f"bad swc: {path}: more than {MAX_DEPTH} elements inside one another")
    values = [prop.get("value", "") for prop in root.iter("prop") if prop.get("key") == "DC.source.audio.offset"]
    if not all(NUMBER.fullmatch(value) and 0 <= float(value) < math.inf for value in values):
        raise ValueError(f"bad swc: {path}: an audio offset is no time")
    offsets = sorted(map(float, values)) or [0.0]
    ignored = {inner for element in root.iter("ignored") for inner in element.iter()}
    segments, paragraph = [], -1
    for element in root.iter():  # in the order of the document
        paragraph += element.tag in ("p", "sectiontitle", "extra")
        if element.tag in ("s", "sectiontitle") and element.find("t") is not None and element not in ignored:
            written, timed = swc_words(element, path)
            part = 0
            if timed:
                part = max(0, sum(offset <= timed[0][1] for offset in offsets) - 1)
                timed = [timed_word(word, *(t - offsets[part] for t in span), path) for word, *span in timed]
            segments.append(Segment(written, timed, part, max(paragraph, 0)))
    return segments


def swc_words(sentence, path):
    """(text, timed words or None) of an <s> or <sectiontitle>. Each <t> may hold several <n>, its spoken words."""
    tokens = [(t, t.get("text", t.text or "")) for t in sentence.iter("t") if t.get("text", t.text)]
    # Tokens either hold their text, with the spaces between them as written, or repeat a part of the sentence's.
    written = sentence.get("text") or "".join(text + (t.tail or "") for t, text in tokens)
    pieces, at = [], 0
    for token, text in tokens:
        begin = written.find(text, at)
        if begin < 0:
            raise ValueError(f"bad swc: {path}: {text[:60]!r} is not in {written[at:at + 60]!r}")
        at = begin + len(text)
        pieces.append((begin, at, token, text))
    timed, at, first = [], 0, 0
    for word in written.split():
        begin = written.index(word, at)
        at = begin + len(word)
        while first < len(pieces) and pieces[first][1] <= begin:
            first += 1
        inside = [piece for piece in pieces[first:first + len(word) + 1] if piece[0] < at]
        spoken = [n for _, _, token, _ in inside for n in token.iter("n")
                  if n.get("start") is not None or comparable(n.get("pronunciation", ""))]
        whole = all(begin <= left and right <= at for left, right, _, _ in inside)
        if not whole or any(n.get("start") is None for n in spoken) or not spoken and comparable(word):
            return " ".join(written.split()), None
        if spoken:
            timed.append(timed_word(word, spoken[0].get("start"), spoken[-1].get("end"), path, 1000))
    return " ".join(written.split()), timed or None


# ---------------------------------------------------------------------------------------------------------------------
# Word times from the waveform: CTC forced alignment, after MMS (Pratap et al., 2023)
#
# A wav2vec 2.0 gives log-probabilities of letters every 20 ms. The Viterbi path through blank, letter, blank, ... says
# when each letter is spoken.

MMS_LABELS = "- a i e n o u t s r m k l d g h y b p w c v j z f ' q x".split()  # column 0 is CTC's blank
WINDOW_SECONDS, CONTEXT_SECONDS = 30, 3  # long audio goes through the model in windows that see this much on each side
BATCH_SECONDS = 120  # of audio in the model at once
BATCH_POINTERS, MAX_POINTERS = 1 << 28, 1 << 31  # bytes of Viterbi back-pointers: of a batch, of a single recording


class Aligner(NamedTuple):
    model: object  # (input_values [B, n], attention_mask [B, n]) -> .logits [B, frames, columns]
    labels: dict  # lower-case letter -> column
    blank: int  # column of CTC's blank
    hop: int  # samples from one frame to the next: 320
    field: int  # samples that a frame sees: 400
    device: str


def load_aligner(folder, device="cpu"):
    """
    An Aligner out of a folder with a Wav2Vec2ForCTC (config.json, model.safetensors) and, unless its columns are
    MMS_LABELS, vocab.json {letter: column}; or, for the name "pocketsphinx", that package's recogniser. Raises
    ValueError if the folder is incomplete, or if the model has no layer-norm extractor (the other kind, "group", would
    let padding change the result).
    """
    if folder == "pocketsphinx":
        return load_sphinx()
    try:
        from transformers import Wav2Vec2ForCTC
    except ImportError:
        raise RuntimeError("transformers is missing: pip install 'smoltolk[speech]'") from None
    try:
        check_size(Wav2Vec2ForCTC, folder)
        model, report = Wav2Vec2ForCTC.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                       ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # of many kinds, by what is damaged and by the version of transformers
        raise ValueError(f"{folder}: no Wav2Vec2ForCTC with model.safetensors ({one_line(error)})") from None
    lacking = {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]}
    lacking -= {"wav2vec2.masked_spec_embed"}  # for training only
    if lacking:
        raise ValueError(f"{folder}: model.safetensors does not have all of the model: {sorted(lacking)[0]}")
    config = model.config
    if config.feat_extract_norm != "layer":
        raise ValueError(f"{folder}: feat_extract_norm is {config.feat_extract_norm!r}; only 'layer' bears padding")
    labels, blank = {label: i for i, label in enumerate(MMS_LABELS)}, 0
    vocabulary = os.path.join(folder, "vocab.json")
    if os.path.exists(vocabulary):
        labels = {label.lower(): i for label, i in read_json(vocabulary).items()}
        blank = labels.get("<blank>", config.pad_token_id)
        if not all(type(i) is int and i >= 0 for i in [*labels.values(), blank]):
            raise ValueError(f"{vocabulary}: is no {{letter: column}} with a column for the blank")
    elif config.vocab_size != len(labels):
        raise ValueError(f"{folder}: {config.vocab_size} columns without a vocab.json; MMS has {len(labels)}")
    labels = {label: i for label, i in labels.items() if re.fullmatch("[a-z']", label) and i != blank}
    if not labels or max(*labels.values(), blank) >= config.vocab_size:
        raise ValueError(f"{folder}: vocab.json does not fit the model's {config.vocab_size} columns")
    return Aligner(model.float().eval().to(device), labels, blank, *frame_geometry(config), str(device))


def emissions(waveforms, aligner):
    """
    Log-probabilities, a float32 tensor [n_frames, columns] for each 16 kHz waveform [n], n >= aligner.field, with
    n_frames = (n - field) // hop + 1. The waveform is normalised as a whole; a batch has pieces alike in length.
    """
    import torch

    window, context = (seconds * SAMPLE_RATE // aligner.hop for seconds in (WINDOW_SECONDS, CONTEXT_SECONDS))
    pieces = []  # (samples, waveform, first frame to keep, how many); all in order
    for i, waveform in enumerate(waveforms):
        samples = torch.as_tensor(np.ascontiguousarray(waveform, np.float32))
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
        n_frames = (len(samples) - aligner.field) // aligner.hop + 1
        for first in range(0, n_frames, window):
            kept = min(window, n_frames - first)
            left, right = max(0, first - context), min(n_frames, first + kept + context)
            cut = samples[left * aligner.hop:(right - 1) * aligner.hop + aligner.field]
            pieces.append((cut, i, first - left, kept))
    order = sorted(range(len(pieces)), key=lambda p: len(pieces[p][0]))
    found = [None] * len(pieces)
    while order:
        size = max(1, BATCH_SECONDS * SAMPLE_RATE // len(pieces[order[-1]][0]))
        batch, order = order[-size:], order[:-size]
        inputs = torch.nn.utils.rnn.pad_sequence([pieces[p][0] for p in batch], batch_first=True)
        lengths = torch.tensor([len(pieces[p][0]) for p in batch])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = aligner.model(inputs.to(aligner.device), attention_mask=mask.to(aligner.device)).logits
            for p, rows in zip(batch, logits.float().log_softmax(-1)):
                found[p] = rows[pieces[p][2]:pieces[p][2] + pieces[p][3]].clone()
    parts = [[] for _ in waveforms]
    for rows, (_, i, _, _) in zip(found, pieces):
        parts[i].append(rows)
    return [torch.cat(rows) for rows in parts]


def ctc_paths(log_probs, targets, blank):
    """
    The likeliest path of CTC through each target: [(states int64 [n_frames], log-probability), ...]. State 2k + 1 is
    token k of the target, even states are the blanks around them; 2L + 1 states for L tokens.

    log_probs: float tensors [n_frames, columns]; targets: lists of L > 0 columns with L + repeats <= n_frames. All are
    one batch; the back-pointers of each utterance take the longest n_frames times the longest 2L + 1 bytes.
    """
    import torch

    device, n = log_probs[0].device, len(targets)
    lengths = torch.tensor([len(rows) for rows in log_probs], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(list(log_probs))  # [T, n, columns]
    columns = torch.full((n, 2 * max(map(len, targets)) + 1), blank)
    for i, target in enumerate(targets):
        columns[i, 1:2 * len(target):2] = torch.tensor(target)
    # from a token straight to the next, without a blank between, unless they are the same
    jumps = torch.zeros(columns.shape, dtype=torch.bool)
    jumps[:, 3::2] = columns[:, 3::2] != columns[:, 1:-2:2]
    columns, jumps = columns.to(device), jumps.to(device)

    exact = torch.float32 if device.type == "mps" else torch.float64
    pointers = torch.zeros((len(padded), *columns.shape), dtype=torch.int8, device=device)  # states gone ahead: 0, 1, 2
    score = padded[0].to(exact).gather(1, columns)
    score[:, 2:] = -math.inf
    for t in range(1, len(padded)):
        step = torch.nn.functional.pad(score, (1, 0), value=-math.inf)[:, :-1]
        jump = torch.nn.functional.pad(score, (2, 0), value=-math.inf)[:, :-2].masked_fill(~jumps, -math.inf)
        best, pointer = torch.stack([score, step, jump]).max(0)
        score = torch.where(t < lengths[:, None], best + padded[t].to(exact).gather(1, columns), score)
        pointers[t] = pointer

    last = torch.tensor([[2 * len(target) - 1, 2 * len(target)] for target in targets], device=device)
    total, which = score.gather(1, last).max(1)  # it ends with the last token or the blank after it
    state = last.gather(1, which[:, None])  # [n, 1]
    path = torch.empty((len(padded), n), dtype=torch.int64, device=device)
    for t in range(len(padded) - 1, -1, -1):
        path[t] = state[:, 0]
        state = torch.where(t < lengths[:, None], state - pointers[t].gather(1, state), state)
    path, total = path.cpu().numpy(), total.tolist()
    return [(path[:len(rows), i], total[i]) for i, rows in enumerate(log_probs)]


def alignment_target(text, aligner):
    """(columns of a text's letters, (first, last + 1) letter or None for each word); ValueError if it has others."""
    target, letters = [], []
    for word in text.split():
        spelling = "".join(spoken_form(word))
        if "'" not in aligner.labels:
            spelling = spelling.replace("'", "")
        if unspeakable(word) or any(letter not in aligner.labels for letter in spelling):
            raise ValueError(f"word cannot be aligned: {word!r} in {text[:60]!r}")
        letters.append((len(target), len(target) + len(spelling)) if spelling else None)
        target += [aligner.labels[letter] for letter in spelling]
    if not target:
        raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
    return target, letters


def align(waveforms, texts, aligner, star=True):
    """
    Word times by forced alignment: for each utterance [(start, end), ...] in seconds for text.split(), or a ValueError
    (returned, not raised, so that the others go on) that says why there are none.

    waveforms: float arrays [n] at 16 kHz; texts: a transcript each; star: MMS's star token, which is as likely as
    certain everywhere, before and after the transcript, where it takes in speech that was not transcribed. (It also
    leaves the first and the last letter no more than their likeliest frame. The ends of all words but the last are
    untouched by it, and word_units asks for no others.)
    A word lasts from the first frame of its first letter to the end of the last frame of its last; frames are spread
    evenly over the audio. Words that are not spoken, and the order of ends, are as in match_words. Viterbi takes
    n_frames * (2L + 1) bytes for L letters, 2 GiB at most: about 20 minutes of speech.
    """
    import torch

    if not isinstance(aligner, Aligner):
        return [align_sphinx(waveform, text, aligner) for waveform, text in zip(waveforms, texts, strict=True)]
    results, waiting = [None] * len(texts), []  # waiting: (utterance, target, letters of each word, n_frames)
    for i, (waveform, text) in enumerate(zip(waveforms, texts, strict=True)):
        try:
            target, letters = alignment_target(text, aligner)
            shift = int(star)
            tokens = [-1] * shift + target + [-1] * shift  # the star will be the last column
            needed = len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:]))
            n_frames = max(0, (len(waveform) - aligner.field) // aligner.hop + 1)
            if n_frames < needed:
                raise ValueError(f"audio too short for its transcript: {n_frames} frames of {needed} for {text[:60]!r}")
            if n_frames * (2 * len(tokens) + 1) > MAX_POINTERS:
                raise ValueError(f"audio too long to align: {len(waveform) / SAMPLE_RATE:.0f} s, {text[:60]!r}")
            if not np.isfinite(waveform).all():
                raise ValueError(f"audio is not finite: {text[:60]!r}")
            waiting.append((i, tokens, [span and (span[0] + shift, span[1] + shift) for span in letters], n_frames))
        except ValueError as error:
            results[i] = error
    rows = dict(zip([w[0] for w in waiting], emissions([waveforms[w[0]] for w in waiting], aligner)))
    waiting.sort(key=lambda w: -w[3])
    while waiting:
        most = longest = 0
        for size, (_, tokens, _, _) in enumerate(waiting, 1):
            longest = max(longest, 2 * len(tokens) + 1)
            if size * waiting[0][3] * longest > BATCH_POINTERS:
                break
            most = size
        batch, waiting = waiting[:max(1, most)], waiting[max(1, most):]
        with_star = [torch.nn.functional.pad(rows.pop(i), (0, 1)) for i, *_ in batch]
        n_columns = with_star[0].shape[1]
        targets = [[column % n_columns for column in tokens] for _, tokens, _, _ in batch]
        for (i, _, letters, n_frames), (path, total) in zip(batch, ctc_paths(with_star, targets, aligner.blank)):
            if not math.isfinite(total):
                results[i] = ValueError(f"alignment failed: the model is not finite on {texts[i][:60]!r}")
                continue
            seconds = len(waveforms[i]) / n_frames / SAMPLE_RATE
            # states ascend along the path, so the frames of letter k are found by bisection
            spans = [span and (np.searchsorted(path, 2 * span[0] + 1) * seconds,
                               np.searchsorted(path, 2 * span[1] - 1, side="right") * seconds) for span in letters]
            results[i] = [(float(start), float(end)) for start, end in fill_spans(spans)]
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Word times from pocketsphinx: an English recogniser of old that pip brings whole (30 MB, no GPU, 60 times real time).
# Its words are those of its dictionary, and it wants the transcript to be all that is said.

SPHINX_STEP = 0.01  # seconds


def load_sphinx():
    """Two recognisers that only align: one with the usual beam, and one that gives up much later, and is slower."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise RuntimeError("pocketsphinx is missing: pip install 'smoltolk[speech]'") from None
    wide = dict(beam=1e-120, wbeam=1e-100, pbeam=1e-120)
    return [Decoder(lm=None, loglevel="FATAL", **beams) for beams in ({}, wide)]


def align_sphinx(waveform, text, decoders):
    """align() of one utterance with pocketsphinx: [(start, end), ...], or a ValueError that says why there are none."""
    try:
        for word in text.split():
            unknown = [form for form in spoken_form(word) if decoders[0].lookup_word(form) is None]
            if unspeakable(word) or unknown:
                raise ValueError(f"word cannot be aligned: {word!r} is not in pocketsphinx's dictionary")
        spoken = [form for word in text.split() for form in spoken_form(word)]
        if not spoken:
            raise ValueError(f"empty transcript: nothing is spoken in {text[:60]!r}")
        samples = (np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
        for decoder in decoders:
            decoder.set_align_text(" ".join(spoken))
            decoder.start_utt()
            decoder.process_raw(samples, full_utt=True)
            decoder.end_utt()
            # "the(2)" is another pronunciation; <s>, </s>, <sil>, [NOISE] and (NULL) are no words
            said = [(part.word.split("(")[0], part.start_frame * SPHINX_STEP, (part.end_frame + 1) * SPHINX_STEP)
                    for part in decoder.seg() or ()]
            said = [part for part in said if part[0] and part[0][0] not in "<["]
            if [part[0] for part in said] == spoken:
                return match_words(text.split(), said, len(waveform) / SAMPLE_RATE)
        raise ValueError(f"alignment failed: pocketsphinx does not hear all of {text[:60]!r}")
    except ValueError as error:
        return error
