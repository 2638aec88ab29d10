"""
The Spoken Wikipedia Corpora, English: articles read by volunteers, partly aligned by sentence and word (Baumann et al.,
2019).

    python -m corpora.swc --source=SWC/english --out=data/swc --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json

Source: nats.gitlab.io/swc. Licence: CC BY-SA.

Layout (as DeepSpeech's import_swc.py reads it): ARTICLE/aligned.swc and ARTICLE/audio.ogg, or audio1.ogg, audio2.ogg,
... if the article was recorded in several parts. An item is a run of neighbouring sentences of up to --segment seconds,
from one paragraph and one part. A sentence with a word that was not aligned is dropped ("no word times"). With
--kind=speech the recordings are cut evenly instead.
"""

import re
from typing import NamedTuple
from xml.etree import ElementTree

from corpora import common, files
from runtime.files import find_files, reading
from speech.audio import duration
from speech.transcripts import comparable
from speech.word_times import read_text, timed_word


class Segment(NamedTuple):
    text: str  # a sentence or a heading as written, with single spaces between words
    words: list | None  # timed words, one for each written word that is spoken; None if one of them has no times
    part: int  # number of the audio file, from 0
    paragraph: int  # number of the paragraph or heading in the article


def read_swc(path):
    """
    The sentences and headings of an aligned.swc (layout swc-1.0) that were read aloud: [Segment]. Raises ValueError if
    the file is damaged.

    In an article of several audio files, the times in aligned.swc run on from file to file. The times of a Segment
    count from the beginning of its audio file.
    """
    xml = read_text(path)
    with reading(f"bad swc: {path}"):
        root = ElementTree.fromstring(xml)
        meta = [prop for prop in root.iter("prop") if prop.get("key") == "DC.source.audio.offset"]
        offsets = sorted(float(prop.get("value", "")) for prop in meta) or [0.0]
    ignored = {inner for element in root.iter("ignored") for inner in element.iter()}
    segments, paragraph = [], -1
    for element in root.iter():  # in the order of the document
        paragraph += element.tag in ("p", "sectiontitle", "extra")
        if element.tag not in ("s", "sectiontitle") or element.find("t") is None or element in ignored:
            continue
        text, words = sentence_words(element, path)
        part = 0
        if words:
            part = max(0, sum(offset <= words[0][1] for offset in offsets) - 1)
            words = [timed_word(word, start - offsets[part], end - offsets[part], path) for word, start, end in words]
        segments.append(Segment(text, words, part, max(paragraph, 0)))
    return segments


def sentence_words(sentence, path):
    """
    (text, timed words or None) of an <s> or <sectiontitle>.

    A token <t> is a word or a punctuation mark as written. It may hold several <n>, the words that it is spoken as. An
    <n> that was aligned has times in milliseconds.
    """
    tokens = [(token, token.get("text", token.text)) for token in sentence.iter("t") if token.get("text", token.text)]
    # Either the sentence has its text as an attribute, or its tokens hold the text and the spaces after them.
    written = sentence.get("text") or "".join(text + (token.tail or "") for token, text in tokens)
    places, at = [], 0  # (begin, end, token), in characters of `written`
    for token, text in tokens:
        begin = written.find(text, at)
        if begin < 0:
            raise ValueError(f"bad swc: {path}: {text[:60]!r} is not in {written[at:at + 60]!r}")
        at = begin + len(text)
        places.append((begin, at, token))

    text, words = " ".join(written.split()), []
    for match in re.finditer(r"\S+", written):
        inside = [place for place in places if place[0] < match.end() and match.start() < place[1]]
        whole = all(match.start() <= begin and end <= match.end() for begin, end, _ in inside)
        spoken = [n for _, _, token in inside for n in token.iter("n")]
        spoken = [n for n in spoken if n.get("start") is not None or comparable(n.get("pronunciation", ""))]
        timed = all(n.get("start") is not None for n in spoken)
        if not whole or not timed or (comparable(match[0]) and not spoken):
            return text, None
        if spoken:
            words.append(timed_word(match[0], spoken[0].get("start"), spoken[-1].get("end"), path, 1000))
    return text, words or None


def find(source, settings):
    return find_files(source, ["aligned.swc"])


def read(path, settings):
    article = path.parent.name
    recordings = [file for file in path.parent.iterdir() if re.fullmatch(r"audio\d*\.ogg", file.name.lower())]
    recordings.sort(key=lambda file: int("0" + re.sub(r"\D", "", file.stem)))
    if settings["kind"] == "speech":
        for recording in recordings:
            spans = files.cut(0.0, duration(recording), settings["segment"])
            for number, (start, end) in enumerate(spans):
                yield common.Item(f"{article}/{recording.stem}_{number}", str(recording), start, end)
        return
    run = []  # [(number, Segment)] of one item
    for number, segment in enumerate(read_swc(path)):
        if run and not continues(run, segment, settings["segment"]):
            yield item(article, run, recordings)
            run = []
        run.append((number, segment))
    if run:
        yield item(article, run, recordings)


def continues(run, segment, seconds):
    """Whether a segment joins the item of a run of segments. A segment without word times joins no others."""
    first, last = run[0][1], run[-1][1]
    if not first.words or not segment.words or segment[2:] != last[2:]:  # another part or paragraph
        return False
    return segment.words[-1][2] - first.words[0][1] <= seconds


def item(article, run, recordings):
    """A run of segments as an Item, or as Bad if it has no word times or no audio."""
    first, last = run[0], run[-1]
    text, words, part, _ = first[1]
    if not words:
        return common.Bad(f"{article}:{first[0]}", ValueError(f"no word times: not all of {text[:60]!r} is aligned"))
    name = f"{article}:{first[0]}-{last[0]}"
    if part >= len(recordings):
        return common.Bad(name, ValueError(f"no audio: part {part + 1} of {article}"))
    text = " ".join(segment.text for _, segment in run)
    words = [word for _, segment in run for word in segment.words]
    return common.Item(name, str(recordings[part]), words[0][1], words[-1][2], text, words)


if __name__ == "__main__":
    common.main(
        "swc", find, read,
        segment=30.0,  # longest document, in seconds
    )
