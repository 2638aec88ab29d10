"""
VoxPopuli: English speech in the European Parliament, 24,100 hours without transcripts and 543 with (Wang et al., 2021).

    python -m corpora.voxpopuli --source=voxpopuli --subset=raw --out=data/voxpopuli --kind=speech --units=units/mhubert
    python -m corpora.voxpopuli --source=voxpopuli --subset=train --out=data/voxpopuli-train --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Source: github.com/facebookresearch/voxpopuli. Licence: CC0.

Layout below --source, as VoxPopuli's scripts download_audios.py and get_asr_data.py make it:
    transcribed_data/en/asr_train.tsv, asr_dev.tsv, asr_test.tsv    tab-separated id, raw_text, normalized_text, ...
    transcribed_data/en/2019/ID.ogg                                 an id begins with the year
    raw_audios/en/2019/SESSION.ogg                                  hours long; cut into segments

The text is raw_text, which has case and punctuation. Where raw_text is empty, it is normalized_text.
"""

from corpora import common, files
from runtime.files import find_files
from speech.audio import duration


def find(source, settings):
    if settings["subset"] != "raw":
        return find_files(source / "transcribed_data" / settings["lang"], [f"asr_{settings['subset']}.tsv"])
    if settings["kind"] != "speech":
        raise SystemExit("--subset=raw has no transcripts: write --kind=speech")
    return find_files(source / "raw_audios" / settings["lang"], [".ogg"])


def read(path, settings):
    if path.suffix.lower() == ".ogg":
        for number, (start, end) in enumerate(files.cut(0.0, duration(path), settings["segment"])):
            yield common.Item(f"{path.stem}_{number}", str(path), start, end)
        return
    lines = files.numbered_lines(path)
    header = next(lines, ("", ""))[1].split("\t")
    if any(header.count(column) != 1 for column in ("id", "raw_text", "normalized_text")):
        raise ValueError(f"its first line is {'  '.join(header)[:60]!r}, without id, raw_text and normalized_text")

    def items(name, line):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{len(fields)} fields, {len(header)} columns")
        row = dict(zip(header, fields))
        audio = files.inside(path.parent, f"{row['id'][:4]}/{row['id']}.ogg")
        yield common.Item(row["id"], audio, text=row["raw_text"].strip() or row["normalized_text"])

    yield from files.convert(lines, items)


if __name__ == "__main__":
    common.main(
        "voxpopuli", find, read,
        lang="en",       # language of the recordings
        subset="train",  # train, dev or test (with transcripts), or raw (without)
        segment=30.0,    # raw: longest document, in seconds
    )
