"""
Books that packages hold, public domain all of them, as plain text: what corpora/prose.py reads aloud.

    apt-get download r-cran-janeaustenr r-cran-tokenizers sword-text-web    # of Debian: Austen, Moby Dick, the WEB
    for package in *.deb; do dpkg-deb -x $package packages; done
    python -m studies.small.books --source=packages --out=books

Reads, anywhere under --source, .rdb files of R packages (zlib-compressed serialised objects, of which the character
vectors as long as a book are taken, a line a string) and .bzz files of SWORD modules (zlib-compressed OSIS, a book
each; see zVerse in SWORD's sources). Writes a .txt for each book, named after its first words.
"""
import argparse
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from runtime.files import whole_folder

SHORTEST = 2_000  # words; what is shorter is no book but a letter, a table, a licence
LONGEST = 1 << 26  # bytes of an object, decompressed
NOTES = re.compile(r"<(note|title|figure)\b(?:[^>]*[^>/])?>.*?</\1>", re.S)  # of OSIS: what is not read aloud
VERSES = re.compile(r"<(verse|chapter|lb?g?|p|div|milestone)\b[^>]*>")  # tags that stand between words


def strings(serialised):
    """The strings of an R object, if it is a character vector (R Internals, 1.8, the XDR format); else none."""
    at = 14 if serialised[2:6] == b"\0\0\0\2" else 18 + int.from_bytes(serialised[14:18])  # version 3 names an encoding
    flags, n = struct.unpack_from(">2i", serialised, at)
    at, lines = at + 8, []
    if flags & 255 != 16:
        return lines
    for _ in range(n):
        length = struct.unpack_from(">i", serialised, at + 4)[0]
        lines.append(serialised[at + 8:at + 8 + max(length, 0)].decode())  # NA has length -1
        at += 8 + max(length, 0)
    return lines


def r_books(path):
    """Texts in an .rdb: objects lie one behind another, each a length (4 bytes) and a zlib stream."""
    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        serialised = stream.decompress(rest[4:], LONGEST)
        if len(serialised) != int.from_bytes(rest[:4]) or not stream.eof:
            raise ValueError("it breaks off")
        yield "\n".join(strings(serialised))
        rest = stream.unused_data


def sword_books(path):
    """Texts in a .bzz; the .bzs beside it says where: (start, length, length when decompressed) of each, uint32."""
    data = path.read_bytes()
    for start, length, _ in np.fromfile(path.with_suffix(".bzs"), "<u4").reshape(-1, 3).tolist():
        stream = zlib.decompressobj()
        osis = stream.decompress(data[start:start + length], LONGEST).decode()
        if not stream.eof:
            raise ValueError("it breaks off")
        yield re.sub("<[^>]*>", "", VERSES.sub(" ", NOTES.sub(" ", osis)))


def find(source):
    """The text of every book under a folder, in the order of their files' paths."""
    readers = {".rdb": r_books, ".bzz": sword_books}
    for path in sorted(path for path in source.rglob("*") if path.suffix in readers and path.is_file()):
        try:
            yield from (text for text in readers[path.suffix](path) if len(text.split()) >= SHORTEST)
        except (zlib.error, struct.error, ValueError, OSError) as error:
            raise SystemExit(f"{path}: not what its name says ({error}); unpack the package again") from None


def make(source, out):
    """Write the books; returns {name: words}. SystemExit if there are none."""
    counts = {}
    with whole_folder(Path(out)) as folder:
        for text in find(Path(source)):
            name = "-".join(re.findall("[a-z0-9]+", text.lower())[:4])[:60]
            if name in counts:
                name += f"-{len(counts)}"
            (folder / f"{name}.txt").write_text(text)
            counts[name] = len(text.split())
        if not counts:
            raise SystemExit(f"{source}: no book of {SHORTEST} words or more in any .rdb or .bzz; see the top of "
                             "studies/small/books.py")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make plain text of the books in packages.")
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", default="books")
    settings = parser.parse_args()
    if Path(settings.out).exists():
        raise SystemExit(f"{settings.out}: exists already; remove it or give another --out")
    counts = make(settings.source, settings.out)
    print("\n".join(f"{words:8,} words  {name}.txt" for name, words in counts.items()))
    print(f"{sum(counts.values()):,} words in {len(counts)} books")
