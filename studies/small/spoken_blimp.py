"""
A spoken twin of BLiMP: its minimal pairs in espeak-ng's voices, in the layout of ZeroSpeech's sBLIMP.

    python -m studies.small.spoken_blimp --source=blimp/data --out=data/spoken_blimp --pairs=2010
    python evaluate.py --checkpoint=out/train_tiny --tasks='["sblimp"]' --sblimp=data/spoken_blimp \\
        --units=data/demo/units

The pairs are spread evenly over BLiMP's paradigms. Both sentences of a pair have the same voice, and with --hiss=true
the same hiss as in corpora/demo.py. Writes syntactic/dev/*.wav (16 kHz, 16 bits) and gold.csv with the columns id,
filename, voice, type, subtype, correct, transcription. type is BLiMP's phenomenon, subtype its paradigm.
"""
import csv
import hashlib
import itertools
import os
import sys
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from benchmarks.blimp import read as read_blimp
from configurator import configure
from corpora.demo import SPEAKERS, add_hiss
from runtime.files import whole_folder
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak

DEFAULTS = dict(
    source="",                 # BLiMP's folder of .jsonl files
    out="data/spoken_blimp",   # folder for syntactic/dev
    pairs=2010,                # number of pairs
    voices=2,                  # voices for each pair
    speakers=list(range(len(SPEAKERS))),  # voices to choose from, by their numbers in corpora/demo.py
    hiss=False,                # add the hiss of the demo
    workers=0,                 # processes; 0: one for each core
)


def rows_of(items, pairs, voices, speakers):
    """Rows of gold.csv for some pairs of BLiMP, equally many of each paradigm, or one more of the first paradigms."""
    paradigms, rows = {}, []
    for item in items:
        paradigms.setdefault(item["paradigm"], []).append(item)
    for n, (paradigm, its_items) in enumerate(sorted(paradigms.items())):
        share = pairs // len(paradigms) + (n < pairs % len(paradigms))
        if share > len(its_items):
            raise ValueError(f"pairs={pairs}: {paradigm} has only {len(its_items)}; give fewer")
        for i, v in itertools.product(range(share), range(voices)):
            item, speaker = its_items[i], speakers[(i + n + v * len(speakers) // voices) % len(speakers)]  # all in turn
            for correct, sentence in ((1, item["good"]), (0, item["bad"])):
                name = hashlib.sha256(f"{paradigm} {i} {speaker} {correct}".encode()).hexdigest()[:11]
                rows.append(dict(id=i, filename=name, voice=f"s{speaker}", type=item["phenomenon"], subtype=paradigm,
                                 correct=correct, transcription=sentence))
    return rows


def speak(job):
    """Write one .wav file. Returns its seconds. job: (path, row of gold.csv, whether to add hiss)."""
    import soundfile

    path, row, hiss = job
    speaker = int(row["voice"][1:])
    waveform, _ = espeak(row["transcription"], *SPEAKERS[speaker])
    if hiss:  # the level of the hiss is drawn by the pair, so both sentences have the same
        waveform = add_hiss(waveform, f"{row['subtype']} {row['id']}", speaker)
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
    return len(waveform) / SAMPLE_RATE


def main(argv):
    settings, _ = configure(DEFAULTS, argv)
    out = Path(settings["out"]) / "syntactic/dev"
    if out.exists():
        raise SystemExit(f"{out}: exists already; remove it or give another --out")
    try:
        items = read_blimp(settings["source"])
        rows = rows_of(items, settings["pairs"], settings["voices"], settings["speakers"])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with whole_folder(out) as folder:
        jobs = [(folder / f"{row['filename']}.wav", row, settings["hiss"]) for row in rows]
        with get_context("spawn").Pool(settings["workers"] or os.cpu_count()) as pool:
            seconds = sum(tqdm(pool.imap_unordered(speak, jobs, 16), "speaking", len(jobs), disable=None))
        with open(folder / "gold.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{out}: {len(rows)} .wav files, {seconds / 3600:.2f} h")


if __name__ == "__main__":
    main(sys.argv[1:])
