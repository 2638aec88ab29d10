"""
Libri-Light: 60,000 hours of LibriVox audiobooks without transcripts (Kahn et al., 2020).

    python -m corpora.librilight --source=librilight/small --out=data/librilight --units=units/mhubert

Source: github.com/facebookresearch/libri-light. Licence: the recordings are in the public domain.

Layout (data_preparation/README.md and cut_by_vad.py in that repository): SUBSET/SPEAKER/BOOK/CHAPTER.flac, and
CHAPTER.json, whose list voice_activity has the [start, end] of each span of speech in seconds.

Chapters last many minutes, so they are cut, and each piece is a document. Neighbouring spans of speech are joined, with
the pauses between them, up to --segment seconds. A longer span, or a chapter without voice activity, is cut evenly.
"""

from corpora import common, files
from runtime.files import find_files, one_line, read_json
from speech.audio import duration


def find(source, settings):
    return find_files(source, [".flac"])


def join(spans, longest):
    """Join neighbouring spans [(start, end)] up to `longest` seconds, and cut longer ones."""
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
        spans = [(float(start), float(end)) for start, end in active]
    except (ValueError, KeyError, TypeError) as error:
        yield common.Bad(path.stem, ValueError(f"unreadable voice activity: {meta} ({one_line(error)})"))
        return
    try:
        spans = join(spans or [(0.0, duration(path))], settings["segment"])
    except ValueError as error:
        yield common.Bad(path.stem, error)
        return
    for number, (start, end) in enumerate(spans):
        yield common.Item(f"{path.stem}_{number}", str(path), start, end)


if __name__ == "__main__":
    common.main(
        "librilight", find, read, kinds=("speech",), companions=[".json"],
        segment=30.0,  # longest document, in seconds
    )
