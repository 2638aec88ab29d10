"""
Libri-Light: 60,000 hours of LibriVox audiobooks without transcripts (Kahn et al., 2020; github.com/facebookresearch/
libri-light; the recordings are in the public domain).

    python -m corpora.librilight --source=librilight/small --out=data/librilight --units=units/mhubert

Layout (data_preparation/README.md and cut_by_vad.py there): SUBSET/SPEAKER/BOOK/CHAPTER.flac and CHAPTER.json beside
it, whose voice_activity lists [start, end] of speech in seconds. Chapters last many minutes: neighbouring spans of
speech are joined, with the pauses between them, for as long as the whole lasts no more than --segment seconds; a
longer span, and a chapter without voice activity, is cut into equal pieces. A piece is a document.
"""

from corpora import common, files
from runtime.files import one_line, read_json


def find(source, settings):
    return files.find_files(source, [".flac"])


def join(spans, longest):
    """Neighbouring spans [(start, end)] joined up to `longest` seconds, longer ones cut."""
    joined = []
    for start, end in sorted(spans):
        if joined and end - joined[-1][0] <= longest:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined += files.cut(start, end, longest)
    return joined


def read(path, settings):
    meta = path.with_suffix(".json")
    try:
        active = read_json(meta)["voice_activity"] if meta.exists() else []
        spans = [(float(start), float(end)) for start, end in active] or [(0.0, files.duration(path))]
        spans = join(spans, settings["segment"])
    except (ValueError, KeyError, TypeError) as error:
        audio = str(error).startswith("unreadable audio")
        said = str(error) if audio else f"unreadable voice activity: {meta} ({one_line(error)})"
        yield common.Bad(path.stem, ValueError(said))
        return
    for number, (start, end) in enumerate(spans):
        yield common.Item(f"{path.stem}_{number}", str(path), start, end)


if __name__ == "__main__":
    common.main("librilight", find, read, kinds=("speech",), segment=30.0)
