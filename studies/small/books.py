"""
Books in the public domain out of packages, as plain text, for studies/small/corpus.py.

    apt-get download r-cran-janeaustenr r-cran-tokenizers sword-text-web    # Debian: Austen, Moby Dick, the World
    for package in *.deb; do dpkg-deb -x $package packages; done            # English Bible
    python -m studies.small.books --source=packages --out=books

Reads all .rdb files of R packages and .bzz files of SWORD modules under --source. An .rdb file holds serialised R
objects; a character vector as long as a book is a book, with a line in each string. A .bzz file holds books in OSIS, an
XML for Bibles. Both are compressed with zlib. Writes a .txt file for each book, named after its first words.
"""
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from configurator import configure
from runtime.files import reading, whole_folder

DEFAULTS = dict(
    source="",    # folder with the unpacked packages
    out="books",  # new folder for the texts
)
SHORTEST = 2_000  # words; shorter texts are letters, tables or licences
NOTES = re.compile(r"<(note|title|figure)\b(?:[^>]*[^>/])?>.*?</\1>", re.S)  # OSIS that is not read aloud
VERSES = re.compile(r"<(verse|chapter|lb?g?|p|div|milestone)\b[^>]*>")  # OSIS tags that stand between words


def strings(serialised):
    """The strings of an R object if it is a character vector (R Internals, 1.8, the XDR format), or else none."""
    at = 14 if serialised[2:6] == b"\0\0\0\2" else 18 + int.from_bytes(serialised[14:18])  # version 3 names an encoding
    flags, n = struct.unpack_from(">2i", serialised, at)
    at, lines = at + 8, []
    for _ in range(n if flags & 255 == 16 else 0):
        length = max(0, struct.unpack_from(">i", serialised, at + 4)[0])  # -1 for NA
        lines.append(serialised[at + 8:at + 8 + length].decode())
        at += 8 + length
    return lines


def r_books(path):
    """The texts in an .rdb file: objects one after the other, each a length (4 bytes) and a zlib stream."""
    rest = path.read_bytes()
    while rest:
        length, stream = int.from_bytes(rest[:4]), zlib.decompressobj()
        serialised = stream.decompress(rest[4:])
        if len(serialised) != length:
            raise ValueError("it breaks off")
        rest = stream.unused_data
        yield "\n".join(strings(serialised))


def sword_books(path):
    """The texts in a .bzz file. The .bzs file of the same name lists (start, length, full length), as uint32."""
    data = path.read_bytes()
    for start, length, _ in np.fromfile(path.with_suffix(".bzs"), "<u4").reshape(-1, 3).tolist():
        osis = zlib.decompress(data[start:start + length]).decode()
        yield re.sub("<[^>]*>", "", VERSES.sub(" ", NOTES.sub(" ", osis)))


def make(source, out):
    """Write the books, in the order of the packages' files. Returns {name: words}. SystemExit."""
    counts, readers = {}, {".rdb": r_books, ".bzz": sword_books}
    with whole_folder(Path(out)) as folder:
        for path in sorted(path for path in Path(source).rglob("*") if path.suffix in readers):
            try:
                with reading(path, "cannot be read; unpack the package again"):
                    texts = [text for text in readers[path.suffix](path) if len(text.split()) >= SHORTEST]
            except ValueError as error:
                raise SystemExit(str(error)) from None
            for text in texts:
                name = "-".join(re.findall("[a-z0-9]+", text.lower())[:4])[:60]
                if name in counts:
                    name += f"-{len(counts)}"
                (folder / f"{name}.txt").write_text(text, encoding="utf-8")
                counts[name] = len(text.split())
        if not counts:
            raise SystemExit(f"{source}: no book of {SHORTEST} words or more in any .rdb or .bzz file; "
                             "python -m studies.small.books --help says which packages have some")
    return counts


if __name__ == "__main__":
    settings, _ = configure(DEFAULTS, sys.argv[1:])
    if Path(settings["out"]).exists():
        raise SystemExit(f"{settings['out']}: exists already; remove it or give another --out")
    for name, words in make(**settings).items():
        print(f"{words:8,} words  {name}.txt")
