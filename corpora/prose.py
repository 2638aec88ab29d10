"""
Books read aloud by espeak-ng, which also gives the word times.

    pip download --no-deps --no-binary :all: sentencepiece==0.2.3 brotli==1.2.1     # the tests hold two books
    tar xf sentencepiece-0.2.3.tar.gz; tar xf brotli-1.2.1.tar.gz; mkdir -p books held_out
    cp sentencepiece-0.2.3/test/botchan.txt books; cp brotli-1.2.1/tests/testdata/alice29.txt held_out
    python -m corpora.prose --source=books --out=data/prose --units=data/demo/units \\
        --tokenizer=weights/smollm2-135m/tokenizer.json

Source: any text. Licence: both books above are in the public domain.

Layout: .txt files in UTF-8, one for each book. Text outside Project Gutenberg's marks is left out. A document is a few
consecutive sentences in one voice, with the hiss of the demo. A hash of the book's name and the document's number
chooses the voice.
"""
import functools
import re
import zlib

from corpora import common, demo
from runtime.files import find_files, open_text

FRAME = re.compile(r"\*\*\* ?(?:START|END) OF TH[^*]*\*\*\*")  # Project Gutenberg's marks around a book
ENDS = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bMessrs)[.!?]["')\]”’]*$""")  # a sentence's last word


def find(source, settings):
    def is_known(speaker):
        return speaker in range(len(demo.SPEAKERS)) if isinstance(speaker, int) else len(speaker) == 3

    if not settings["speakers"] or not all(map(is_known, settings["speakers"])):
        raise SystemExit(f"--speakers={settings['speakers']}: give numbers from 0 to {len(demo.SPEAKERS) - 1}, or "
                         f'[voice, words a minute, pitch], such as ["es", 180, 50]')
    return find_files(source, [".txt"])


def passages(text, size):
    """Yield a text in pieces: each ends with the first sentence that brings it to `size` words. Dashes are left out."""
    text = text.replace("_", "").replace("--", " ").replace("\u2014", " ")
    passage = []
    for word in text.split():
        if any(map(str.isalnum, word)):
            passage.append(word)
            if len(passage) >= size and ENDS.search(word):
                yield " ".join(passage)
                passage = []
    if passage:
        yield " ".join(passage)


def read(path, settings):
    with open_text(path, "surrogateescape") as file:
        parts = FRAME.split(file.read())
    book = parts[1] if len(parts) > 2 else max(parts, key=len)  # the licence may be longer than a short book
    for number, text in enumerate(passages(book, settings["passage"])):
        name = f"{path.stem}-{number:05}"
        speaker = settings["speakers"][zlib.crc32(name.encode()) % len(settings["speakers"])]
        yield common.Item(name, functools.partial(demo.record, text, speaker), text=text)


if __name__ == "__main__":
    common.main(
        "prose", find, read,
        passage=40,  # a document ends with the first sentence that brings it to this many words
        speakers=list(range(len(demo.SPEAKERS))),  # voices: numbers in corpora/demo.py or [voice, rate, pitch]
    )
