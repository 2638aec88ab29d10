"""
The Spoken Wikipedia Corpora, English: volunteers read articles, sentences and words partly aligned (Baumann, Koehn and
Hennig, 2019; nats.gitlab.io/swc; CC BY-SA).

    python -m corpora.swc --source=SWC/english --out=data/swc --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Layout (as DeepSpeech's import_swc.py reads it): ARTICLE/aligned.swc and ARTICLE/audio.ogg, or audio1.ogg, audio2.ogg,
... if it was read in several parts. An item is a run of neighbouring sentences of one paragraph and one part, all
words of which have times, of up to --segment seconds. A sentence with a word that was not aligned is dropped ("no word
times"). With --kind=speech recordings are cut evenly.
"""

import math
import re
from typing import NamedTuple
from xml.etree import ElementTree

from corpora import common, files
from runtime.files import one_line
from speech.transcripts import comparable
from speech.word_times import NUMBER, read_text, timed_word

MAX_DEPTH = 100  # of elements in elements of swc, which has about 10


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


def find(source, settings):
    return files.find_files(source, ["aligned.swc"])


def read(path, settings):
    recordings = sorted(path.parent.glob("audio*.ogg"), key=lambda p: int("0" + re.sub(r"\D", "", p.stem)))
    run, article = [], path.parent.name
    if settings["kind"] == "speech":  # all of it, aligned or not
        for recording in recordings:
            for number, span in enumerate(files.cut(0.0, files.duration(recording), settings["segment"])):
                yield common.Item(f"{article}/{recording.stem}_{number}", str(recording), *span)
        return
    for number, segment in enumerate([*read_swc(path), None]):
        fits = run and segment and segment.words and segment[2:] == run[-1][1][2:] and (
            segment.words[-1][2] - run[0][1].words[0][1] <= settings["segment"])
        if run and not fits:
            yield item(article, run, recordings)
            run = []
        if segment and segment.words:
            run.append((number, segment))
        elif segment:
            name = f"{article}:{number}"
            yield common.Bad(name, ValueError(f"no word times: {segment.text[:60]!r} in {path} is not wholly aligned"))


def item(article, run, recordings):
    """A run of [(number, Segment)] as an Item."""
    name, part = f"{article}:{run[0][0]}-{run[-1][0]}", run[0][1].part
    words = [word for _, segment in run for word in segment.words]
    if part >= len(recordings):
        return common.Bad(name, ValueError(f"no audio: part {part + 1} of {article}"))
    text = " ".join(segment.text for _, segment in run)
    return common.Item(name, str(recordings[part]), words[0][1], words[-1][2], text, words)


if __name__ == "__main__":
    common.main("swc", find, read, segment=30.0)
