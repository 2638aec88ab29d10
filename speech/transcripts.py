"""
How written words are spoken, and which times belong to each of them.

A transcript is text.split(): written words, with their case and punctuation. A timed word is (text, start, end), with
times in seconds. Both are compared in their spoken form: lower-case words made of a-z and the apostrophe.
"""
import math
import re
import unicodedata

from speech.units import UNIT_RATE, word_units

# Letters that Unicode does not decompose into a-z, apostrophes of all kinds, and signs that are read as words.
FOLD = str.maketrans({
    "æ": "ae", "œ": "oe", "ø": "o", "ß": "ss", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i",
    "’": "'", "‘": "'", "ʼ": "'", "ʻ": "'", "′": "'", "´": "'", "`": "'", "＇": "'",
    "&": " and ", "%": " percent ", "+": " plus ", "@": " at ", "−": " minus "})
CURRENCY = {"$": "dollar", "£": "pound", "€": "euro", "¥": "yen"}
AMOUNT = re.compile(r"([$£€¥])?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?:(st|nd|rd|th)(?![a-z])|([$£€¥]))?")
# Unicode's categories of letters, digits and signs. Characters of others, such as punctuation, are not spoken.
SPOKEN_CATEGORIES = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Sc", "Sm", "So"}
SILENCES = {"", "sp", "sil"}  # entries of time files that mark a pause, as do all in brackets: "<eps>", "[noise]"
FRAME = 1 / UNIT_RATE  # seconds by which word times may be wrong
LONGEST_WORD, LONGEST_LETTER = 5.0, 0.2  # a word lasts at most 5 s, and 0.2 s for each letter of its spoken form
UNKNOWN = "<unk>"  # the Montreal Forced Aligner writes this for a word that its dictionary does not have


def fold(word):
    """A word in lower case, without accents, ligatures and typographic apostrophes. Signs become words: "&", "and"."""
    letters = unicodedata.normalize("NFC", word).lower().translate(FOLD)
    # Only letters are decomposed. Decomposing "½" would give "1/2", which nobody says.
    letters = "".join(unicodedata.normalize("NFKD", c) if c.isalpha() else c for c in letters)
    return "".join(c for c in letters.lower().translate(FOLD) if unicodedata.category(c)[0] != "M")


def say_amount(match):
    """The English words for a match of AMOUNT. Raises RuntimeError if num2words is not installed."""
    try:
        from num2words import num2words
    except ImportError:
        raise RuntimeError("num2words is missing: pip install -e '.[speech]'") from None

    def one_by_one(digits):
        return " ".join(num2words(int(digit)) for digit in digits)

    def cardinal(digits):
        if len(digits) > 15 or (len(digits) > 1 and digits[0] == "0"):  # for example a telephone number
            return one_by_one(digits)
        return num2words(int(digits))

    before, number, ordinal, after = match.groups()
    if re.fullmatch("1[1-9][0-9][0-9]", number) and not (before or ordinal or after):
        return f" {num2words(int(number), to='year')} "
    whole, _, decimals = number.replace(",", "").partition(".")
    if ordinal and not decimals and len(whole) <= 15:
        return f" {num2words(int(whole), to='ordinal')} "
    amount = cardinal(whole) if whole else ""
    currency = CURRENCY.get(before or after, "")
    if currency and currency != "yen" and number != "1":
        currency += "s"
    if currency and len(decimals) == 2:
        cents = "" if decimals == "00" else cardinal(decimals)
        return f" {amount or 'zero'} {currency} {cents} "
    if decimals:
        amount += f" point {one_by_one(decimals)}"
    return f" {amount} {currency} {ordinal or ''} "


def spoken_form(word):
    """
    The words, made of a-z and ', that a written word is spoken as: "Well-known" -> [well, known], "21st" -> [twenty,
    first], "$3.50" -> [three, dollars, fifty], "café's" -> [cafe's], "--" -> [].

    1100 to 1999 are read as years. Decimals, and numbers that begin with zero or have more than 15 digits, are read
    digit by digit. Characters that cannot be spelled are left out; unspeakable() lists them. Raises RuntimeError if
    num2words is missing.
    """
    if word.isascii() and word.isalpha():
        return [word.lower()]
    text = AMOUNT.sub(say_amount, fold(word))
    parts = [part.strip("'") for part in re.findall("[a-z']+", text)]
    return [part for part in parts if part]


def unspeakable(word):
    """The letters, digits and signs of a word that spoken_form() leaves out: for "это," they are "это"."""
    if word.isascii() and word.isalpha():
        return ""
    rest = AMOUNT.sub(" ", fold(word))
    return "".join(c for c in rest if not "a" <= c <= "z" and unicodedata.category(c) in SPOKEN_CATEGORIES)


def comparable(word):
    """The spoken form of a word. If it cannot spell the word in full: [the word itself, without punctuation]."""
    if unspeakable(word):
        return ["".join(c for c in fold(word) if unicodedata.category(c) in SPOKEN_CATEGORIES)]
    return spoken_form(word)


def match_words(words, timed, duration=None):
    """
    The time span of each written word: [(start, end), ...] in seconds.

    words: text.split(); timed: [(text, start, end), ...] in order; duration: seconds of the audio, or None.

    A written word gets all timed words of its spoken form ("well-known" has two). The timed word <unk> stands for any
    one written word. A word that is not spoken ("--") gets an empty span from fill_spans().

    The match must be exact: nothing is guessed, and written words never share a timed word. Raises ValueError
    "transcript does not match word times: ..." at the first difference, and the errors of fill_spans().
    """
    entries = spoken_entries(timed)
    spans, position = [], 0
    for number, word in enumerate(words, 1):
        forms = comparable(word)
        if not forms:
            spans.append(None)
            continue
        unknown = position < len(entries) and entries[position][0] == UNKNOWN
        taken = entries[position:position + (1 if unknown else len(forms))]
        same = unknown or [form for form, *_ in taken] == forms
        if not same or taken[-1][2] is None:  # None: the timed word has more parts than the written word
            texts = " ".join(dict.fromkeys(text for *_, text in taken))
            have = f"have {texts[:60]!r}" if taken else "end"
            raise ValueError(f"transcript does not match word times: at word {number} {word[:60]!r} the times {have}")
        starts = [start for _, start, _, _ in taken]
        if any(b < a - FRAME for a, b in zip(starts, starts[1:])):
            raise ValueError(f"impossible word times: the parts of word {number} {word[:60]!r} are not in order")
        spans.append((starts[0], taken[-1][2]))
        position += len(taken)
    if position < len(entries) or not any(spans):
        have = f"have {entries[position][3][:60]!r}" if position < len(entries) else "and the transcript are empty"
        raise ValueError(f"transcript does not match word times: after the last word the times {have}")
    return fill_spans(words, spans, duration)


def spoken_entries(timed):
    """
    Timed words as [(spoken word, start, end, text), ...]. A timed word that is spoken as several words becomes several
    entries. The last of them has the end; the others have None.
    """
    entries = []
    for text, start, end in timed:
        is_unknown = text.lower() == UNKNOWN
        if is_unknown or not (text.lower() in SILENCES or re.fullmatch(r"<.*>|\[.*\]", text)):
            forms = [UNKNOWN] if is_unknown else comparable(text)
            entries += [(form, start, None, text) for form in forms[:-1]]
            entries += [(form, start, end, text) for form in forms[-1:]]
    return entries


def fill_spans(words, spans, duration=None):
    """
    Check the spans of written words, replace None by empty spans, and make the ends ascend.

    words: as written; spans: (start, end) of each in seconds, or None for a word that is not spoken. None becomes an
    empty span at the end of the span before it, or, if there is none, at the start of the first span. Differences of
    up to one unit frame are evened out: an end before an earlier end is raised to it, a start after its end is lowered
    to it, and a span that exceeds the audio is cut. duration: seconds of the audio, or None.

    Raises ValueError "impossible word times: ..." for a word that begins or ends before the word before it, or lasts
    too long, and "word times outside the audio: ...".
    """
    filled, latest = [], next(span[0] for span in spans if span)
    first, last = -math.inf, -math.inf  # start and end of the word before
    for number, (word, span) in enumerate(zip(words, spans, strict=True), 1):
        start, end = span or (latest, latest)
        said = f"word {number} {word[:60]!r} lasts from {start:.3f} to {end:.3f} s"
        if duration is not None and (start < -FRAME or end > duration + FRAME):
            raise ValueError(f"word times outside the audio: {said} of {duration:.3f} s")
        if span and (start < first - FRAME or end < last - FRAME):
            raise ValueError(f"impossible word times: {said}, the word before it from {first:.3f} to {last:.3f} s")
        if end - start > LONGEST_WORD and end - start > LONGEST_WORD + LONGEST_LETTER * sum(map(len, comparable(word))):
            raise ValueError(f"impossible word times: {said}")
        first, last = span or (first, last)
        latest = max(latest, end)
        filled.append((min(start, latest), latest))
    if duration is None:
        return filled
    return [(min(max(start, 0.0), duration), min(max(end, 0.0), duration)) for start, end in filled]


def assign_units(words, spans, frame_start, n_frames, rate):
    """word_units() of words with their spans in seconds: offsets, int64 [n_words + 1].

    Raises ValueError "impossible word times: ..." if more than half of the spoken words have no units or no duration.
    """
    ends = [end for _, end in spans]
    offsets = word_units(ends, frame_start, n_frames, rate)
    own = word_units([*ends, ends[-1]], frame_start, n_frames, rate)  # the last word without what follows its end
    spoken = [i for i, word in enumerate(words) if any(map(str.isalnum, word))]
    empty = sum(own[i] == own[i + 1] or spans[i][0] == spans[i][1] for i in spoken)
    if 2 * empty > len(spoken):
        raise ValueError(f"impossible word times: {empty} of {len(spoken)} words have no units or no duration")
    return offsets
