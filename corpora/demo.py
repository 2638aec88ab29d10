"""
The demo: a tiny counterpart of sTinyStories, written by a grammar, spoken by espeak-ng and turned into mel units.

    python -m corpora.demo --out=data/demo --seed=0

A story has four sentences and is about one of eight topics. The third sentence is the good or bad cause of what happens
in the fourth. The fourth shares no content word with the first three. Apart from names and times, no content word is
used in two topics. So no repeated word, name or pronoun gives the true ending away. A model can only recognise it if it
has learnt from other stories which words go together.

The output folder appears as a whole when everything is done. It contains:

    tokenizer.json      byte-level BPE, trained on the stories of text/ and paired/
    units/              the unit vocabulary, fitted on recordings of paired/
    text/               stories as text only
    paired/ val/ test/  stories as text and speech, aligned by word; no story occurs twice in text/ and these sets
    cloze/              documents in threes: the opening of a test story (sentences 1 to 3), its ending (sentence 4),
                        and the ending of a story about another topic, in the same voice
    wavs/               a few recordings with their texts
    utterance.png       one recording: waveform, spectrogram, units and words
    demo.json           parameters, counts, hours of speech, seconds taken

Source: this file. Licence: the repository's.
"""

import functools
import importlib
import inspect
import json
import math
import multiprocessing
import random
import re
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import wavfile
from tqdm import tqdm

from configurator import configure
from corpora.common import worker_environment
from runtime.datasets import write_set
from runtime.files import read_json, whole_folder
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak, espeak_paths
from speech.mel import fit_mel_units, mel_frames, save_mel_units, voice
from speech.units import HOP, UNIT_RATE, word_units

VERSION = 5  # raise it whenever a change to the code changes the data of the same parameters
FIT_ON = 192  # number of recordings that the units are fitted on
EXAMPLES = 4  # number of recordings that are saved as .wav

# ---------------------------------------------------------------------------------------------------------------------
# The grammar. {a|b} is a choice, NAME is a name, and HE, HIM and HIS are its pronouns. Words also sound different: none
# are homophones, and few pairs differ by only one sound.

NAMES = {
    "Anna": ("She", "her", "her"), "Lucy": ("She", "her", "her"),
    "Molly": ("She", "her", "her"), "Grace": ("She", "her", "her"),
    "Tom": ("He", "him", "his"), "Oscar": ("He", "him", "his"),
    "Peter": ("He", "him", "his"), "David": ("He", "him", "his"),
}
WHEN = ("Last week,", "Long ago,", "One morning,", "One evening,")

# topic: first sentence, second sentence, (good cause, good ending), (bad cause, bad ending)
TOPICS = {
    "baking": (
        "NAME the baker mixed flour with {butter|sugar|honey}.",
        "HE rolled the {soft|heavy} dough and heated the oven.",
        ("HE watched the {clock|timer} and wore thick {gloves|mittens}.",
         "The {golden|crispy} {loaf|muffin} smelled {lovely|fresh}, and hungry neighbors ate it."),
        ("HE fell asleep and never heard the {clock|timer}.",
         "{Black|Bitter} smoke filled the {kitchen|cottage}, and the {loaf|muffin} was {burnt|ruined}."),
    ),
    "sailing": (
        "NAME the sailor left the harbor in a wooden {boat|raft}.",
        "HE crossed the ocean to find {whales|dolphins|pearls}.",
        ("A {gentle|steady} wind {pushed|carried} HIM to an island.",
         "The anchor dropped by a {sandy|sunny} {beach|cove} with {coconuts|treasure}."),
        ("A {sudden|violent} storm {ripped|shredded} the sails.",
         "The {vessel|wreck} sank, and {sharks|seagulls} circled over the {planks|mast}."),
    ),
    "gardening": (
        "NAME planted {tomato|pumpkin|carrot} seeds in HIS garden.",
        "HE dug the muddy soil with a {rusty|shiny} {shovel|spade}.",
        ("{Rain|Sunshine} came every day in {spring|April}.",
         "Tall {vines|stems} bloomed, and {bees|butterflies} visited the {purple|yellow} petals."),
        ("{Greedy|Nasty} {snails|rabbits} came under the {fence|hedge}.",
         "The {leaves|roots} were chewed, and everything turned {brown|yellow} and {withered|rotten}."),
    ),
    "soccer": (
        "NAME joined a soccer team with a {strict|famous} coach.",
        "HE {kicked|headed} the ball at the goal.",
        ("HE trained {daily|hard} with the other {players|strikers}.",
         "The {crowd|fans} cheered when the {referee|mayor} gave them a {trophy|medal}."),
        ("HE missed training and {twisted|sprained} an {ankle|elbow}.",
         "The rivals scored {twice|easily}, and the {crowd|fans} booed from the {bleachers|stadium}."),
    ),
    "music": (
        "NAME borrowed a {violin|trumpet} from HIS {uncle|grandma}.",
        "HE wanted to play a {melody|waltz} at a school concert.",
        ("HE practiced until every {note|chord} was perfect.",
         "The {audience|listeners} {clapped|whistled} and threw {roses|ribbons} onto the stage."),
        ("HE never practiced and forgot every {note|chord}.",
         "The {audience|listeners} {yawned|groaned}, and the {velvet|dusty} curtain closed in {shame|silence}."),
    ),
    "space": (
        "NAME became an astronaut and built a {silver|giant} rocket.",
        "HE flew past the moon to explore {Mars|Jupiter|Saturn}.",
        ("The {engine|computer} worked {smoothly|safely}, and the fuel lasted.",
         "{Friendly|Cheerful} {aliens|robots} waved and danced by a glowing {crater|canyon}."),
        ("The {engine|computer} {exploded|failed}, and the fuel leaked.",
         "The capsule {drifted|tumbled} into {darkness|nowhere}, and nobody answered the {radio|signal}."),
    ),
    "puppy": (
        "NAME adopted a {fluffy|spotted} puppy with {floppy|pointed} ears.",
        "It {sniffed|chased} {squirrels|pigeons} near the park on its leash.",
        ("HE taught it tricks with {biscuits|chicken|sausage}.",
         "The {loyal|sleepy} {pet|hound} wagged its tail on a {cozy|checkered} {pillow|blanket}."),
        ("The leash slipped on a {busy|noisy} {street|highway}.",
         "{Sad|Paper} {posters|notices} hung on {lampposts|doorways}, but the {pet|hound} stayed missing."),
    ),
    "castle": (
        "NAME the knight rode to a {haunted|distant} castle.",
        "A {fierce|wicked} dragon guarded the {princess|queen} there.",
        ("HE {raised|lifted} a {magic|mighty} sword and shield.",
         "The {monster|serpent} surrendered, and the kingdom celebrated a {royal|joyful} {wedding|banquet}."),
        ("HIS {magic|mighty} sword {snapped|melted}, and the horse {fled|bolted}.",
         "Hot flames {scorched|swallowed} the {armor|helmet}, and {ravens|vultures} landed on the ruins."),
    ),
}

FUNCTION_WORDS = set(
    "a all an and at but by did every from he her him his in into it its near never of on onto other over she so "
    "that the them there to under until was were when with".split()
)


class Story(NamedTuple):
    sentences: tuple  # four strings
    topic: str
    good: bool

    def text(self):
        return " ".join(self.sentences)


def story_words(text):
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def write_story(rng, topic, good):
    """Return a random Story with this topic and outcome."""
    name = rng.choice(list(NAMES))
    he, him, his = NAMES[name]
    first, second, *outcomes = TOPICS[topic]
    cause, ending = outcomes[0 if good else 1]
    sentences = []
    for sentence in (f"{rng.choice(WHEN)} {first}", second, cause, ending):
        sentence = re.sub(r"\{([^}]*)\}", lambda choice: rng.choice(choice[1].split("|")), sentence)
        for key, value in (("NAME", name), ("HE", he), ("HIM", him), ("HIS", his)):
            sentence = re.sub(rf"\b{key}\b", value, sentence)
        sentences.append(sentence[0].upper() + sentence[1:])
    return Story(tuple(sentences), topic, good)


def check_grammar():
    """Assert the assumptions of the cloze test (see the top of this file). Return the number of different stories."""
    who_and_when = set(story_words(" ".join([*NAMES, *WHEN, "NAME he him his she her"])))
    owners, count = {}, 0
    for topic, (first, second, *outcomes) in TOPICS.items():
        for cause, ending in outcomes:
            assert not who_and_when & set(story_words(ending)), f"{topic}: the ending says who or when"
            opening = f"{first} {second} {cause}"
            for side, text in (("opening", opening), ("ending", ending)):
                for word in set(story_words(text)) - FUNCTION_WORDS - who_and_when:
                    owner = owners.setdefault(word, (topic, side))
                    assert owner == (topic, side), f"{word}: is in {topic}, {side} and in {owner}"
            choices = [slot.count("|") + 1 for slot in re.findall(r"\{[^}]*\}", opening + ending)]
            count += len(NAMES) * len(WHEN) * math.prod(choices)
    return count


def write_stories(count, seed):
    """Return `count` different stories in random order. All topics and outcomes are equally frequent."""
    if count > check_grammar() // 3:
        raise SystemExit(f"{count} stories are too many for the grammar to give different ones; ask for fewer")
    rng = random.Random(seed)
    kinds = [(topic, good) for topic in TOPICS for good in (True, False)]
    stories = {}  # a dict keeps the order and ignores repetitions
    while len(stories) < count:
        rng.shuffle(kinds)
        for topic, good in kinds:
            stories[write_story(rng, topic, good)] = None
    return list(stories)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Speaking

# (voice, words a minute, pitch): men and women, American, British and Scottish. The more voices there are, the harder a
# word is to recognise from its units. With only two male voices, SmolTolk and the baseline both understand everything
# within 1500 steps, so their scores do not differ. How similar are the voices? For a word in "en-us", the most similar
# word in another voice is the same word in 98% of cases at another pitch and rate, 97% with "+m3", 92% with "+m7", 74%
# with "+f2". "+f2", "+f3" and "+f5" are not used: their breath noise depends on the clock, so runs would differ.
SPEAKERS = (("en-us", 200, 40), ("en-us+m3", 210, 50), ("en-us+f1", 200, 65), ("en-us+m7", 190, 35),
            ("en-gb-x-rp", 200, 45), ("en-us+f4", 210, 60), ("en-gb-scotland", 195, 50), ("en-gb-x-rp+f4", 190, 70))
# The demo uses four of them, so that a short run learns to understand them. studies/small and corpora/prose.py use all.
DEMO_SPEAKERS = (0, 2, 4, 5)

# White noise ("hiss") is added to each recording, at a signal-to-noise ratio drawn uniformly from this range in dB.
# Without hiss, synthetic speech is too easy: a word always sounds the same, and its units nearly spell it.
SIGNAL_TO_NOISE = (5, 15)


class Recording(NamedTuple):
    story: Story
    speaker: int  # index into SPEAKERS
    seconds: float
    units: list  # unit ids of each word, uint16 arrays


def record(text, speaker):
    """Return (waveform with hiss, words) as espeak() does. The same text and speaker always give the same sound.

    speaker: a number in SPEAKERS, or (voice of espeak-ng, words a minute, pitch)
    """
    waveform, words = espeak(text, *(SPEAKERS[speaker] if isinstance(speaker, int) else speaker))
    return add_hiss(waveform, text, speaker), words


def signal_to_noise(text, speaker):
    """Return (signal-to-noise ratio in dB, random generator for the hiss) of this text and speaker."""
    number = speaker if isinstance(speaker, int) else zlib.crc32(str(speaker).encode())
    rng = np.random.default_rng([zlib.crc32(text.encode()), number])
    return rng.uniform(*SIGNAL_TO_NOISE), rng


def add_hiss(waveform, text, speaker):
    """Return float32 [n]: a waveform [n] with hiss at the level drawn for this text and speaker."""
    decibels, rng = signal_to_noise(text, speaker)
    hiss = rng.standard_normal(len(waveform)) * np.sqrt(np.mean(waveform**2)) / 10 ** (decibels / 20)
    return np.clip(waveform + hiss, -1, 1).astype(np.float32)


def features(job):
    """Return (mel frames, voice) of one recording, to fit the units on."""
    story, speaker = job
    waveform, _ = record(story.text(), speaker)
    return mel_frames(waveform), voice(waveform)


def speak(job, codebook):
    """Return the Recording of a (story, speaker), or None if espeak-ng did not time all words."""
    story, speaker = job
    waveform, words = record(story.text(), speaker)
    if words is None:
        return None
    ids, frame_start = codebook.encode([waveform])[0]
    offsets = word_units([end for _, end in words], frame_start, len(waveform) // HOP)
    units = [ids[start:end] for start, end in zip(offsets[:-1], offsets[1:])]
    return Recording(story, speaker, len(waveform) / SAMPLE_RATE, units)


def draw_speakers(name, count, seed):
    """Return the speakers of the first `count` stories of a set, as numbers in SPEAKERS."""
    rng = random.Random(f"{seed} {name}")
    return [rng.choice(DEMO_SPEAKERS) for _ in range(count)]


def speak_all(sets, n_units, seed, workers):
    """Return ({name: list of Recording}, codebook) of {name: list of Story}. Neither depends on `workers`.

    The codebook is fitted on the first recordings of "paired" only.
    """
    jobs, recordings = {}, {}
    for name, stories in sets.items():
        jobs[name] = list(zip(stories, draw_speakers(name, len(stories), seed)))
    with worker_environment(), multiprocessing.get_context("spawn").Pool(workers) as pool:
        frames, voices = zip(*pool.map(features, jobs["paired"][:FIT_ON], 8))
        codebook = fit_mel_units(frames, n_units, seed, voices=voices)
        for name, its_jobs in jobs.items():
            spoken = pool.imap(functools.partial(speak, codebook=codebook), its_jobs, 8)
            spoken = tqdm(spoken, f"speaking {name}", len(its_jobs), unit=" stories", disable=None)
            recordings[name] = [recording for recording in spoken if recording is not None]
    return recordings, codebook


# ---------------------------------------------------------------------------------------------------------------------
# Writing

SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()  # SmolLM's special tokens, ids 0 to 16


def train_tokenizer(texts, vocab_size, path):
    """Write a tokenizer.json: byte-level BPE that splits text as SmolLM does (single digits, then GPT-2's pattern)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def cut_cloze(recordings, documents, seed):
    """Cut test documents into cloze documents in threes: opening, true ending, false ending.

    recordings, documents: of the test set; a document is (token ids of each word, units of each word).
    The false ending is from a story about another topic by the same speaker. The level of hiss differs, which only adds
    noise to the scores. Endings are cut from whole stories, so the tokens of their first word include the space before.
    """
    rng = random.Random(f"{seed} cloze")
    lengths = [len(recording.story.sentences[3].split()) for recording in recordings]
    cloze = []
    for recording, length, (tokens, units) in zip(recordings, lengths, documents):
        others = [i for i, other in enumerate(recordings)
                  if other.speaker == recording.speaker and other.story.topic != recording.story.topic]
        if not others:  # only in very small sets
            continue
        other = rng.choice(others)
        false_tokens, false_units = documents[other]
        cloze.append((tokens[:-length], units[:-length]))
        cloze.append((tokens[-length:], units[-length:]))
        cloze.append((false_tokens[-lengths[other]:], false_units[-lengths[other]:]))
    return cloze


def write_sets(out, texts, recordings, codebook, seed):
    """Write the units and the data sets. Return the counts for demo.json."""
    tokenizer = Tokenizer(out / "tokenizer.json")
    save_mel_units(out / "units", codebook)
    facts = dict(n_units=len(codebook.centroids), rate=UNIT_RATE, hash=codebook.hash)
    source = "corpora/demo.py"
    write_set(out / "text", "text", map(tokenizer.encode, texts), tokenizer, source=source)
    counts = dict(text=dict(stories=len(texts)))
    for name, its_recordings in recordings.items():
        documents = []
        for recording in its_recordings:
            documents.append((tokenizer.encode_words(recording.story.text().split()), recording.units))
        write_set(out / name, "paired", documents, tokenizer, facts, source)
        if name == "test":
            cloze = cut_cloze(its_recordings, documents, seed)
            write_set(out / "cloze", "paired", cloze, tokenizer, facts, source)
            counts["cloze"] = dict(items=len(cloze) // 3)
        hours = sum(recording.seconds for recording in its_recordings) / 3600
        counts[name] = dict(stories=len(its_recordings), hours=round(hours, 3))
    spoken = [len(word) for recording in recordings["paired"] for word in recording.units]
    return dict(counts=counts, vocab_size=tokenizer.vocab_size, units_per_word=round(float(np.mean(spoken)), 3))


def write_examples(out, recordings, codebook):
    """Write wavs/ and utterance.png."""
    (out / "wavs").mkdir()
    for i, recording in enumerate(recordings[:EXAMPLES]):
        waveform, words = record(recording.story.text(), recording.speaker)
        wavfile.write(out / f"wavs/{i}.wav", SAMPLE_RATE, np.round(waveform * 32767).astype(np.int16))
        (out / f"wavs/{i}.txt").write_text(recording.story.text() + "\n")
        if i == 0:
            figures = importlib.import_module("tools.figures")  # imported here, because matplotlib is slow to load
            figures.utterance(out / "utterance.png", waveform, codebook, recording.story.text().split(),
                              [end for _, end in words])


def reuse(out, parameters):
    """Return the demo.json of a finished demo. Raises SystemExit if the folder is no demo or has other parameters."""
    try:
        about = read_json(out / "demo.json")
    except ValueError:
        raise SystemExit(f"{out} exists and is not a finished demo: remove it or name another folder") from None
    differing = [key for key in parameters if about["parameters"].get(key) != parameters[key]]
    if differing:
        raise SystemExit(f"{out} was made with another {', '.join(differing)}: remove it or name another folder")
    return about


def make(
    out="data/demo",  # the folder to make
    seed=0,           # random seed of everything
    text=20000,       # stories as text only
    train=1200,       # spoken stories in paired/
    val=100,          # spoken stories in val/
    test=500,         # spoken stories in test/
    n_units=80,       # speech units
    vocab_size=1400,  # text tokens, at most
    workers=2,        # processes; the data does not depend on their number
):
    """Make the demo, in less than a minute, and return its demo.json. A finished demo with these parameters is kept.

    Raises SystemExit if `out` is something else, RuntimeError if espeak-ng is missing.
    """
    out = Path(out)
    parameters = dict(seed=seed, text=text, train=train, val=val, test=test, n_units=n_units, vocab_size=vocab_size,
                      speakers=[list(SPEAKERS[i]) for i in DEMO_SPEAKERS], version=VERSION)
    if out.exists():
        return reuse(out, parameters)
    espeak_paths()  # raises at once if espeak-ng is missing
    print(f"making {out}: {train + val + test} stories are spoken and cut into units, less than a minute", flush=True)
    began = time.time()
    stories = write_stories(test + val + train + text, seed)
    sets = {}
    for name, count in dict(test=test, val=val, paired=train).items():
        sets[name], stories = stories[:count], stories[count:]
    texts = [story.text() for story in stories]
    recordings, codebook = speak_all(sets, n_units, seed, workers)

    try:
        with whole_folder(out) as folder:
            train_tokenizer(texts + [story.text() for story in sets["paired"]], vocab_size, folder / "tokenizer.json")
            counts = write_sets(folder, texts, recordings, codebook, seed)
            write_examples(folder, recordings["paired"], codebook)
            about = dict(parameters=parameters, **counts, seconds_taken=round(time.time() - began, 1))
            (folder / "demo.json").write_text(json.dumps(about, indent=1))
    except OSError:
        if not out.exists():
            raise
        return reuse(out, parameters)  # another process, which began at the same time, was faster
    return about


def find_or_make(folder):
    """Return the demo.json of the demo that a training run asks for, which is made first if the folder is missing.

    A demo that was made with other parameters is used as it is, and they are printed. Raises SystemExit as make() does.
    """
    if not Path(folder).exists():
        return make(folder)
    about = reuse(Path(folder), dict(version=VERSION))
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    changed = {name: value for name, value in about["parameters"].items() if defaults.get(name, value) != value}
    if changed:
        print(f"{folder}: made with {', '.join(f'{name}={value}' for name, value in changed.items())}")
    return about


if __name__ == "__main__":
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    print(json.dumps(make(**configure(defaults, sys.argv[1:])[0]), indent=1))
