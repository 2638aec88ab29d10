"""
Word times from files that a corpus ships.
"""
import codecs
import math
import re
import reprlib

from runtime.files import one_line, parse_json, read_bytes
from speech.audio import SAMPLE_RATE

# Word times from files that a corpus ships. Whatever is wrong with a file is a ValueError "REASON: details".

TOUCHING = 0.001  # seconds; intervals of a tier follow one another, but for rounding
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
