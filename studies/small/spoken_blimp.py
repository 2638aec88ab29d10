"""
A spoken twin of BLiMP: minimal pairs as espeak-ng says them, in the layout of ZeroSpeech's sBLIMP.

    python -m studies.small.spoken_blimp --source=blimp/data --out=data/spoken_blimp --pairs=2010
    python evaluate.py --checkpoint=out/train_tiny --tasks='["sblimp"]' --sblimp=data/spoken_blimp \\
        --units=data/demo/units

--source is BLiMP's folder of .jsonl files; the pairs are spread evenly over its paradigms. Each pair is spoken by
--voices of the demo's speakers that --speakers names, the same for both sentences; with --hiss=true under hiss, equally
loud for both, as corpora/demo.py and small.py have it. Writes syntactic/dev/*.wav (16 kHz, 16 bits) and gold.csv
with columns id, filename, voice, type, subtype, correct, transcription: type is BLiMP's phenomenon, subtype its
paradigm.
"""
import csv
import hashlib
import os
import sys
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from benchmarks.blimp import read as read_blimp
from configurator import configure
from corpora.demo import SPEAKERS, add_hiss
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak

DEFAULTS = dict(source="", out="data/spoken_blimp", pairs=2010, voices=2,
                speakers=list(range(len(SPEAKERS))), hiss=False, workers=0)


def rows_of(items, pairs, voices, speakers):
    """Rows of gold.csv for `pairs` of BLiMP's items, as many from each paradigm (one more from the first ones)."""
    paradigms, rows = {}, []
    for item in items:
        paradigms.setdefault(item["paradigm"], []).append(item)
    for n, (paradigm, its_items) in enumerate(sorted(paradigms.items())):
        share = pairs // len(paradigms) + (n < pairs % len(paradigms))
        if share > len(its_items):
            raise ValueError(f"pairs={pairs}: {paradigm} has only {len(its_items)}; give fewer")
        for i, item in enumerate(its_items[:share]):
            for v in range(voices):
                speaker = speakers[(i + n + v * len(speakers) // voices) % len(speakers)]  # all in turn
                for correct, sentence in ((1, item["good"]), (0, item["bad"])):
                    name = hashlib.sha256(f"{paradigm} {i} {speaker} {correct}".encode()).hexdigest()[:11]
                    rows.append(dict(id=i, filename=name, voice=f"s{speaker}", type=item["phenomenon"],
                                     subtype=paradigm, correct=correct, transcription=sentence))
    return rows


def speak(job):
    """Write one wav; returns its seconds."""
    import soundfile

    path, text, speaker, pair = job
    waveform, _ = espeak(text, *SPEAKERS[speaker])
    if pair:
        waveform = add_hiss(waveform, pair, speaker)  # both sentences at the level drawn for their pair
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
    return len(waveform) / SAMPLE_RATE


def main(argv):
    settings, _ = configure(DEFAULTS, argv)
    folder = Path(settings["out"]) / "syntactic/dev"
    if folder.exists():
        raise SystemExit(f"{folder}: exists already; remove it or write elsewhere")
    speakers = settings["speakers"]
    if not speakers or any(speaker not in range(len(SPEAKERS)) for speaker in speakers):
        raise SystemExit(f"speakers={speakers}: give numbers from 0 to {len(SPEAKERS) - 1}")
    if not 1 <= settings["voices"] <= len(speakers):
        raise SystemExit(f"voices={settings['voices']}: give 1 to {len(speakers)}")
    try:
        rows = rows_of(read_blimp(settings["source"]), settings["pairs"], settings["voices"], speakers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    folder.mkdir(parents=True)
    jobs = [(folder / f"{row['filename']}.wav", row["transcription"], int(row["voice"][1:]),
             f"{row['subtype']} {row['id']}" if settings["hiss"] else None) for row in rows]
    with get_context("spawn").Pool(settings["workers"] or os.cpu_count()) as pool:
        seconds = sum(tqdm(pool.imap_unordered(speak, jobs, 16), "speaking", len(jobs), disable=None))
    with open(folder / "gold.csv", "w", encoding="utf-8", newline="") as f:  # last: a folder that has it is whole
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{folder}: {len(rows) // 2 // settings['voices']} pairs, {settings['voices']} voices each, {len(rows)} wavs,"
          f" {seconds / 3600:.2f} h")


if __name__ == "__main__":
    main(sys.argv[1:])
