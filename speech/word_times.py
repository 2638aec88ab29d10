"""
Read word times from the files that come with a corpus: TextGrid, ctm, json, and TIMIT's .WRD.

A timed word is (text, start, end), with times in seconds. The readers return timed words in the order of the file. They
raise a ValueError of one line, "KIND OF FAULT: PATH: details", for a file that cannot be used.
"""
import math
import re
import reprlib

from runtime.files import open_text, parse_json, reading
from speech.audio import SAMPLE_RATE

NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() also takes "nan" and "1_0"
WORD_TIER = re.compile(r"words?|.*- words", re.IGNORECASE)  # names that aligners give to the tier of a TextGrid
ROUNDING = 0.001  # seconds by which neighbouring intervals of a tier may overlap


def read_text(path):
    """The text of a file."""
    with reading(f"unreadable word times: {path}"), open_text(path) as file:
        return file.read()


def timed_word(text, start, end, path, rate=1):
    """A timed word, from times in units of 1 / rate seconds. Raises ValueError if they cannot be times."""
    times = [float(str(time)) / rate for time in (start, end) if NUMBER.fullmatch(str(time))]
    if isinstance(text, str) and len(times) == 2 and 0 <= times[0] <= times[1] < math.inf:
        return text.strip(), *times
    raise ValueError(f"bad word times: {path}: {reprlib.repr(text)} from {reprlib.repr(start)} to {reprlib.repr(end)}")


def read_wrd(path, sample_rate=SAMPLE_RATE):
    """Timed words of TIMIT's .WRD. Each line is `BEGIN END word`, in samples at `sample_rate`."""
    timed = []
    for line in read_text(path).split("\n"):
        if line.strip():
            begin, end, word = [*line.split(maxsplit=2), None, None][:3]
            timed.append(timed_word(word, begin, end, path, sample_rate))
    return timed


def read_ctm(path):
    """{utterance: timed words} of NIST's ctm. Each line is `utterance channel start duration word [confidence]`."""
    utterances, channels = {}, {}
    for line in read_text(path).split("\n"):
        if not line.strip() or line.startswith(";;"):
            continue
        with reading(f"bad word times: {path}", f"not a line of ctm: {line[:60]!r}"):
            utterance, channel, start, duration, word = line.split()[:5]
            end = float(start) + float(duration)
        if channels.setdefault(utterance, channel) != channel:
            raise ValueError(f"bad word times: {path}: {utterance[:60]} has more than one channel")
        utterances.setdefault(utterance, []).append(timed_word(word, start, end, path))
    return utterances


def read_timed_json(path):
    """
    Timed words of a json file in one of these forms:

        LIST, or {"words": LIST}                   LIST is [{"word" or "text", "start", "end"}, ...]
        {"segments": [{"words": LIST}, ...]}       Whisper
        {"tiers": {"words": {"entries": [[start, end, word], ...]}}}     Montreal Forced Aligner
    """
    text = read_text(path)
    with reading(f"bad word times: {path}", "not json of words with times"):
        found = parse_json(text, path, list, dict)
        if isinstance(found, dict) and "tiers" in found:
            rows = [(word, start, end) for start, end, word in found["tiers"]["words"]["entries"]]
        else:
            parts = [dict(words=found)] if isinstance(found, list) else found.get("segments") or [found]
            words = [word for part in parts for word in part["words"]]
            rows = [(word.get("word", word.get("text")), word["start"], word["end"]) for word in words]
    return [timed_word(*row, path) for row in rows]


def read_textgrid(path):
    """
    Timed words of a Praat TextGrid in the long or short text format, without the empty intervals. The file must have
    exactly one interval tier named words, word or "SPEAKER - words", in upper or lower case. Raises RuntimeError if
    praatio is missing.
    """
    text = read_text(path)
    try:
        from praatio.utilities.textgrid_io import parseTextgridStr
    except ImportError:
        raise RuntimeError("praatio is missing: pip install -e '.[speech]'") from None
    tiers = []
    with reading(f"bad TextGrid: {path}"):
        # praatio skips the last interval of a file that does not end with a newline.
        for found in parseTextgridStr(text + "\n", includeEmptyIntervals=True)["tiers"]:
            if found["class"] == "IntervalTier":
                rows = [(word, start, end) for start, end, word in found["entries"]]
                if rows and float(rows[-1][2]) < float(found["xmax"]) - ROUNDING:  # praatio does not check
                    raise ValueError(f"tier {found['name']} breaks off before its end")
                tiers.append((str(found["name"]), rows))
    chosen = [rows for name, rows in tiers if WORD_TIER.fullmatch(name)]
    if len(chosen) != 1:
        names = reprlib.repr([name for name, _ in tiers])
        raise ValueError(f"no word tier: {path}: {len(chosen)} of the interval tiers {names} are called words")
    timed = [timed_word(*row, path) for row in chosen[0]]
    for (_, _, end), (word, start, _) in zip(timed, timed[1:]):
        if start < end - ROUNDING:
            raise ValueError(f"bad word times: {path}: {word[:60]!r} begins before the end of the interval before it")
    return [word for word in timed if word[0]]
