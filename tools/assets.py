"""
Make assets/tiny: two trained models of the tiny study in float16, and what one needs to try them at once.

    python -m tools.assets --smoltolk=out/study_tiny/smoltolk-1 --baseline=out/study_tiny/baseline-1

The folder holds weights, tokenizer.json and units.json of SmolTolk and of vocabulary expansion, the demo's units and
held-out sets, and some held-out stories as sound, whole and without their last sentence. In float16 SmolTolk has the
Topic-Cloze scores that it has in float32; in bfloat16 it does not. This takes seconds.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from configurator import configure
from corpora.demo import draw_speakers, record, write_stories
from evaluate import newest_checkpoint
from model import from_pretrained, save_pretrained
from runtime.datasets import open_set
from runtime.files import read_json, whole_folder
from speech.audio import SAMPLE_RATE, write_audio
from speech.units import load_units

smoltolk = "out/study_tiny/smoltolk-1"  # folder of a run
baseline = "out/study_tiny/baseline-1"  # folder of a run
demo = "data/demo"                      # the demo corpus that both were trained on
stories = [29, 37, 39, 55]              # numbers of stories in the demo's test set
out = "assets/tiny"                     # the folder to make
DEFAULTS = dict(smoltolk=smoltolk, baseline=baseline, demo=demo, stories=stories, out=out)


def copy_model(run, folder):
    """Write the newest checkpoint of a run to a folder, in float16, without what only training needs."""
    checkpoint = newest_checkpoint(run)
    save_pretrained(from_pretrained(checkpoint), folder, torch.float16)
    for name in ("tokenizer.json", "units.json"):
        shutil.copy(checkpoint / name, folder)


def speak_again(demo, numbers):
    """Yield (number, waveform, words, ends of words in seconds, words in the last sentence) of stories in the test set.

    ValueError if the sound does not give the units in the test set.
    """
    parameters = read_json(demo / "demo.json")["parameters"]
    told = write_stories(sum(parameters[name] for name in ("test", "val", "train", "text")), parameters["seed"])
    speakers = draw_speakers("test", parameters["test"], parameters["seed"])
    test, vocabulary = open_set(demo / "test"), load_units(demo / "units")
    for number in numbers:
        story = told[number]
        waveform, times = record(story.text(), speakers[number])
        [(units, _)] = vocabulary.encode([waveform])
        if not np.array_equal(units, test.document(number)[1][:-1]):
            raise ValueError(f"{demo}/test: document {number} is not what story {number} sounds like")
        yield number, waveform, story.text().split(), [end for _, end in times], len(story.sentences[-1].split())


def main(argv):
    c, _ = configure(DEFAULTS, argv, described_in=[__file__])
    demo = Path(c["demo"])
    if Path(c["out"]).exists():
        raise SystemExit(f"{c['out']}: exists already; remove it or choose another --out")
    with whole_folder(c["out"]) as folder:
        for name in ("smoltolk", "baseline"):
            copy_model(c[name], folder / name)
        for name in ("units", "val", "cloze", "test"):
            shutil.copytree(demo / name, folder / name)
        (folder / "stories").mkdir()
        for number, waveform, words, ends, n_last in speak_again(demo, c["stories"]):
            opening = waveform[:round(ends[-n_last - 1] * SAMPLE_RATE)]
            write_audio(folder / f"stories/{number}.flac", waveform)
            write_audio(folder / f"stories/{number}-opening.flac", opening)
            about = dict(number=number, words=words, ends=ends, opening=len(words) - n_last)
            (folder / f"stories/{number}.json").write_text(json.dumps(about))
        command = f"python -m tools.assets {' '.join(argv)}".strip()
        made = dict(command=command, runs=[c["smoltolk"], c["baseline"]])
        (folder / "made.json").write_text(json.dumps(made, indent=1))
    size = sum(path.stat().st_size for path in Path(c["out"]).rglob("*"))
    print(f"{c['out']}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
