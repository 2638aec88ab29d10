"""
Books read aloud: plain text files in espeak-ng's voices, with its own word times.

    pip download --no-deps --no-binary :all: sentencepiece==0.2.3 brotli==1.2.1     # two books in their tests
    tar xf sentencepiece-0.2.3.tar.gz; tar xf brotli-1.2.1.tar.gz; mkdir -p books held_out
    cp sentencepiece-0.2.3/test/botchan.txt books; cp brotli-1.2.1/tests/testdata/alice29.txt held_out
    python -m corpora.prose --source=books --out=data/prose --units=data/demo/units \\
        --tokenizer=weights/smollm2-135m/tokenizer.json

Layout: .txt files, a book each, UTF-8; what stands outside Project Gutenberg's marks is left out. A document is some
consecutive sentences, at least --passage words of them, in one voice: one of the demo's speakers that --speakers names,
drawn by the document's place, under the demo's hiss.
"""
import functools
import re
import zlib

from corpora import common, demo, files

FRAME = re.compile(r"\*\*\* ?(?:START|END) OF TH[^*]*\*\*\*")  # around a book from Project Gutenberg
ENDS = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bMessrs)[.!?]["')\]”’]*$""")  # of a word: a sentence's


def find(source, settings):
    unknown = [s for s in settings["speakers"] if s not in range(len(demo.SPEAKERS))]
    if unknown or not settings["speakers"]:
        raise SystemExit(f"--speakers={settings['speakers']}: give numbers from 0 to {len(demo.SPEAKERS) - 1}")
    return files.find_files(source, [".txt"])


def passages(text, size):
    """Cut a text at ends of sentences into strings of at least `size` words, dashes and the like left out."""
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
    parts = FRAME.split(path.read_text("utf-8-sig", errors="surrogateescape"))
    for i, text in enumerate(passages(max(parts, key=len), settings["passage"])):
        name = f"{path.stem}-{i:05}"
        speaker = settings["speakers"][zlib.crc32(name.encode()) % len(settings["speakers"])]
        yield common.Item(name, functools.partial(demo.record, text, speaker), text=text)


if __name__ == "__main__":
    common.main("prose", find, read, passage=40, speakers=list(range(len(demo.SPEAKERS))))
