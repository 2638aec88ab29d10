"""
What a transcript sounds like, and which written word each timed word belongs to.
"""
import re
import unicodedata

from speech.units import UNIT_RATE

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
