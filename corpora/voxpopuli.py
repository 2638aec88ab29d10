"""
VoxPopuli: the European Parliament, 24,100 hours of English without and 543 with transcripts (Wang et al., 2021;
github.com/facebookresearch/voxpopuli; CC0).

    python -m corpora.voxpopuli --source=voxpopuli --subset=raw --out=data/voxpopuli --kind=speech --units=units/mhubert
    python -m corpora.voxpopuli --source=voxpopuli --subset=train --out=data/voxpopuli-train --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --aligner=aligners/mms

Layout (as its scripts download_audios.py and get_asr_data.py leave it), below --source:
    transcribed_data/en/asr_train.tsv, asr_dev.tsv, asr_test.tsv    tab-separated id, raw_text, normalized_text, ...
    transcribed_data/en/2019/ID.ogg                                 the year is the beginning of the id
    raw_audios/en/2019/SESSION.ogg                                  --subset=raw; hours long, so cut every --segment s
The text is raw_text, which has case and punctuation, or normalized_text where that is empty.
"""

from corpora import common, files
from runtime.files import one_line


def find(source, settings):
    if settings["subset"] != "raw":
        return files.find_files(source / "transcribed_data" / settings["lang"], [f"asr_{settings['subset']}.tsv"])
    if settings["kind"] != "speech":
        raise SystemExit("--subset=raw has no transcripts: write --kind=speech")
    return files.find_files(source / "raw_audios" / settings["lang"], [".ogg"])


def read(path, settings):
    if path.suffix == ".ogg":
        for number, (start, end) in enumerate(files.cut(0.0, files.duration(path), settings["segment"])):
            yield common.Item(f"{path.stem}_{number}", str(path), start, end)
        return
    header, *lines = files.lines(path)
    for number, line in enumerate(lines, 2):
        row = dict(zip(header.split("\t"), line.split("\t")))
        try:
            audio = files.inside(path.parent, f"{row['id'][:4]}/{row['id']}.ogg")
            yield common.Item(row["id"], audio, text=row["raw_text"].strip() or row["normalized_text"])
        except (KeyError, ValueError) as error:
            bad = ValueError(f"unreadable record: {path}, line {number} ({one_line(error)})")
            yield common.Bad(f"{path.name}:{number}", bad)


if __name__ == "__main__":
    common.main("voxpopuli", find, read, lang="en", subset="train", segment=30.0)
