"""
The embedded demo: a tiny twin of sTinyStories, written by a grammar, spoken by espeak-ng and turned into mel units.

    python -m corpora.demo --out=data/demo --seed=0

A story has four sentences and is about one of eight topics. Its third sentence is the cause, good or bad, of what the
fourth tells. The fourth shares no content word with the first three, and no content word of a fourth sentence, nor of
an opening, is found in two topics. So whoever picks the true ending of a story has learnt which words go together
from other stories; nothing on the surface, neither a repeated word nor a name nor a pronoun, gives it away.

Written to the output folder, which appears whole when everything is done:

    tokenizer.json      byte-level BPE, trained on the stories of text/ and paired/
    units/              the k-means codebook, fitted on recordings of paired/
    text/               stories as text only
    paired/ val/ test/  spoken stories with word times; no story is found twice in all the sets
    cloze/              documents in threes: the opening of a test story (sentences 1 to 3), its ending (sentence 4),
                        and the ending of a story of another topic, said by the same speaker
    wavs/               a few recordings with their texts
    utterance.png       one recording: spectrogram, units and words
    demo.json           parameters, counts, hours of speech, seconds taken
"""

import argparse
import importlib
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import time
import zlib
from typing import NamedTuple

import numpy as np
from scipy.io import wavfile
from tqdm import tqdm

from corpora.common import one_blas_thread
from runtime.datasets import write_set
from runtime.files import read_json, whole_folder
from runtime.tokenizer import Tokenizer
from speech.audio import SAMPLE_RATE
from speech.espeak import espeak, espeak_paths
from speech.mel import fit_mel_units, mel_frames, save_mel_units, voice
from speech.units import HOP, UNIT_RATE, word_units

# ---------------------------------------------------------------------------------------------------------------------
# The grammar: {a|b} is a choice, NAME a name, HE, HIM and HIS its pronouns. Words are kept apart by ear as well:
# no homophones, few that differ by one sound.

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


def story_words(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def write_story(rng, topic, good):
    """One random story of this topic and outcome."""
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
    """Asserts what the cloze test rests on (see the top of this file); returns the number of distinct stories."""
    shared = {word for text in (*WHEN, *NAMES) for word in story_words(text)} | FUNCTION_WORDS
    owner, count = {}, 0
    for topic, (first, second, *outcomes) in TOPICS.items():
        for cause, ending in outcomes:
            opening = " ".join((first, second, cause))
            for side, text in (("opening", opening), ("ending", ending)):
                slots = re.sub(r"NAME|HE|HIM|HIS", "", re.sub(r"\{([^}|]*)[^}]*\}", r"\1", text))
                content = [word for word in story_words(slots) if word not in FUNCTION_WORDS]
                assert len(content) >= (6 if side == "opening" else 4), f"{topic}: too few content words in its {side}"
                text = re.sub(r"\b(NAME|HE|HIM|HIS)\b", "", text)
                for word in set(story_words(text)) - shared:
                    assert owner.setdefault(word, (topic, side)) == (topic, side), f"{word}: {topic}, {owner[word]}"
            assert not set(story_words(ending)) & (shared - FUNCTION_WORDS), f"{topic}: its ending tells a name or time"
            assert not re.search(r"\b(HE|HIM|HIS|he|him|his|she|her)\b", ending), f"{topic}: its ending tells who"
            choices = [slot.count("|") + 1 for slot in re.findall(r"\{[^}]*\}", opening + ending)]
            count += len(NAMES) * len(WHEN) * math.prod(choices)
    return count


def write_stories(count, seed):
    """`count` different stories, topics and outcomes in equal parts and mixed."""
    assert count < check_grammar() // 3, "the grammar has too few stories for so many different ones"
    rng = random.Random(seed)
    kinds = [(topic, good) for topic in TOPICS for good in (True, False)]
    stories = {}  # a dict keeps the order and drops what was there before
    while len(stories) < count:
        rng.shuffle(kinds)
        for topic, good in kinds:
            stories[write_story(rng, topic, good)] = None
    return list(stories)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Speaking

# (voice, rate in words a minute, pitch): men, women, American, British, Scottish. The more voices, the less a word's
# units say by themselves. How well a word said by "en-us" is told by what the nearest word of another voice is (see
# speech.py): other pitches and rates 98%, "+m3" 97%, "+m7" 92%, "+f2" 74%. With two male voices both SmolTolk and the
# baseline hear all there is to hear within 1500 steps, and no difference is left to see. "+f2", "+f3" and "+f5" are
# left out: espeak-ng draws their breath from the clock, and the data would be another each time.
SPEAKERS = (("en-us", 200, 40), ("en-us+m3", 210, 50), ("en-us+f1", 200, 65), ("en-us+m7", 190, 35),
            ("en-gb-x-rp", 200, 45), ("en-us+f4", 210, 60), ("en-gb-scotland", 195, 50), ("en-gb-x-rp+f4", 190, 70))


# dB by which the voice stands above hiss, drawn evenly for each recording. Clean synthetic speech is too easy: what one
# word sounds like, it always sounds like, and units alone nearly spell it.
SIGNAL_TO_NOISE = (5, 15)


class Recording(NamedTuple):
    story: Story
    speaker: int  # index into SPEAKERS
    seconds: float
    units: list  # unit ids of each word, uint16 arrays
    waveform: np.ndarray | None  # int16, kept where it was asked for
    ends: list  # of each word, in seconds


def record(text, speaker):
    """A text as a speaker says it, under hiss: what espeak returns. A pure function."""
    waveform, words = espeak(text, *SPEAKERS[speaker])
    return add_hiss(waveform, text, speaker), words


def signal_to_noise(text, speaker):
    """(by how many dB a recording of this text stands above its hiss, the generator to draw that from)."""
    rng = np.random.default_rng([zlib.crc32(text.encode()), speaker])
    return rng.uniform(*SIGNAL_TO_NOISE), rng


def add_hiss(waveform, text, speaker):
    decibels, rng = signal_to_noise(text, speaker)
    hiss = rng.standard_normal(len(waveform)) * np.sqrt(np.mean(waveform**2)) / 10 ** (decibels / 20)
    return np.clip(waveform + hiss, -1, 1).astype(np.float32)


def speak_for_fit(job):
    """Features and voice of one recording, to fit the units on."""
    story, speaker = job
    waveform, _ = record(" ".join(story.sentences), speaker)
    return mel_frames(waveform), voice(waveform)


def speak(job):
    """One story to a Recording; None if its words could not be timed."""
    story, speaker, codebook, keep_waveform = job
    waveform, words = record(" ".join(story.sentences), speaker)
    if words is None:
        return None
    ids, frame_start = codebook.encode([waveform])[0]
    offsets = word_units([end for _, end in words], frame_start, len(waveform) // HOP)
    units = [ids[a:b] for a, b in zip(offsets[:-1], offsets[1:])]
    kept = np.round(waveform * 32767).astype(np.int16) if keep_waveform else None
    return Recording(story, speaker, len(waveform) / SAMPLE_RATE, units, kept, [end for _, end in words])


def speak_all(sets, n_units, seed, workers):
    """
    sets: name -> list of Story. Returns (name -> list of Recording, codebook). The codebook is fitted on the first
    recordings of "paired" only. Neither depends on `workers`.
    """
    jobs = {}
    for name, stories in sets.items():
        rng = random.Random(f"{seed} {name}")
        jobs[name] = [(story, rng.randrange(len(SPEAKERS))) for story in stories]
    recordings = {name: [] for name in jobs}
    bar = tqdm(total=sum(map(len, jobs.values())), desc="speaking", unit=" stories", disable=None)
    with one_blas_thread(), multiprocessing.get_context("spawn").Pool(workers) as pool, bar:
        frames, voices = zip(*pool.map(speak_for_fit, jobs["paired"][:FIT_ON], 8))
        codebook = fit_mel_units(frames, n_units, seed, voices=voices)
        for name, its_jobs in jobs.items():
            its_jobs = [(*job, codebook, name == "paired" and i < EXAMPLES) for i, job in enumerate(its_jobs)]
            for recording in pool.imap(speak, its_jobs, 8):
                bar.update()
                if recording is not None:
                    recordings[name].append(recording)
    return recordings, codebook


# ---------------------------------------------------------------------------------------------------------------------
# Writing

SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()  # SmolLM's, ids 0 to 16


def train_tokenizer(texts, vocab_size, path):
    """Byte-level BPE with SmolLM's pre-tokenization (each digit alone, then GPT-2's pattern), as a tokenizer.json."""
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
    """
    Test documents to cloze documents in threes: opening, true ending, false ending.

    recordings, documents: the test set, the latter as (token ids of each word, units of each word).
    The false ending is that of another topic's story by the same speaker: it differs from the true one in what it
    tells, and in how loud the hiss is, which is noise in the scores of spoken endings. Endings are slices of whole
    stories: their first word keeps the space before it.
    """
    rng = random.Random(f"{seed} cloze")
    cloze = []
    lengths = [len(recording.story.sentences[3].split()) for recording in recordings]
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
    """Writes the data sets, and the units; returns counts for demo.json."""
    tokenizer = Tokenizer(os.path.join(out, "tokenizer.json"))
    save_mel_units(os.path.join(out, "units"), codebook)
    units = dict(n_units=len(codebook.centroids), rate=UNIT_RATE, hash=codebook.hash)
    source = "corpora/demo.py"
    write_set(os.path.join(out, "text"), "text", map(tokenizer.encode, texts), tokenizer=tokenizer, source=source)
    counts = dict(text=dict(stories=len(texts)))
    for name, its_recordings in recordings.items():
        documents = [
            (tokenizer.encode_words(" ".join(recording.story.sentences).split()), recording.units)
            for recording in its_recordings
        ]
        sets = {name: documents}
        if name == "test":
            sets["cloze"] = cut_cloze(its_recordings, documents, seed)
            counts["cloze"] = dict(items=len(sets["cloze"]) // 3)
        for folder, documents in sets.items():
            write_set(os.path.join(out, folder), "paired", documents, tokenizer=tokenizer, units=units,
                           source=source)
        hours = sum(recording.seconds for recording in its_recordings) / 3600
        counts[name] = dict(stories=len(its_recordings), hours=round(hours, 3))
    spoken = [len(word) for recording in recordings["paired"] for word in recording.units]
    return dict(counts=counts, vocab_size=tokenizer.vocab_size, units_per_word=round(float(np.mean(spoken)), 3))


def write_examples(out, recordings, codebook):
    """Writes wavs/ and utterance.png."""
    folder = os.path.join(out, "wavs")
    os.makedirs(folder)
    examples = [recording for recording in recordings if recording.waveform is not None]
    for i, recording in enumerate(examples):
        wavfile.write(os.path.join(folder, f"{i}.wav"), SAMPLE_RATE, recording.waveform)
        with open(os.path.join(folder, f"{i}.txt"), "w") as file:
            file.write(" ".join(recording.story.sentences) + "\n")
    first = examples[0]
    figures = importlib.import_module("tools.figures")  # here, because matplotlib takes long to import
    figures.utterance(os.path.join(out, "utterance.png"), first.waveform / np.float32(32767), codebook,
                      " ".join(first.story.sentences).split(), first.ends)


# ---------------------------------------------------------------------------------------------------------------------
# All of it

VERSION = 4  # to be raised whenever the same parameters come to give other data
FIT_ON, EXAMPLES = 192, 4  # recordings that the units are fitted on; that are kept as .wav


def reuse(out, parameters):
    """What demo.json of a finished demo says; SystemExit if the folder is no demo or has other parameters."""
    try:
        about = read_json(os.path.join(out, "demo.json"))
    except ValueError:
        raise SystemExit(f"{out} exists and is not a finished demo: remove it or choose another --out") from None
    differing = [key for key in parameters if about["parameters"].get(key) != parameters[key]]
    if differing:
        raise SystemExit(f"{out} was made with another {', '.join(differing)}: remove it or choose another --out")
    return about


def make(out="data/demo", seed=0, text=20000, train=2000, val=100, test=500, n_units=80, vocab_size=1400, workers=2):
    """
    Make the demo in folder `out`, in about a minute, and return what demo.json says.

    seed: of everything; text: stories as text only; train, val, test: spoken stories; n_units: mel units;
    vocab_size: tokens at most; workers: processes (the data does not depend on them).
    A finished demo with the same parameters is left as it is. SystemExit if there is another thing at `out`,
    RuntimeError without espeak-ng.
    """
    parameters = dict(seed=seed, text=text, train=train, val=val, test=test, n_units=n_units, vocab_size=vocab_size,
                      speakers=[list(speaker) for speaker in SPEAKERS], version=VERSION)
    if os.path.exists(out):
        return reuse(out, parameters)
    espeak_paths()  # say at once if it is missing
    print(f"making {out}: {train + val + test} stories are spoken and cut into units, about a minute", flush=True)
    began = time.time()
    stories = write_stories(test + val + train + text, seed)
    sets = {}
    for name, count in dict(test=test, val=val, paired=train).items():
        sets[name], stories = stories[:count], stories[count:]
    written = [" ".join(story.sentences) for story in stories]
    recordings, codebook = speak_all(sets, n_units, seed, workers)

    with whole_folder(out) as folder:
        temporary = str(folder)
        path = os.path.join(temporary, "tokenizer.json")
        train_tokenizer(written + [" ".join(story.sentences) for story in sets["paired"]], vocab_size, path)
        about = write_sets(temporary, written, recordings, codebook, seed)
        write_examples(temporary, recordings["paired"], codebook)
        about = dict(parameters=parameters, **about, seconds_taken=round(time.time() - began, 1))
        with open(os.path.join(temporary, "demo.json"), "w") as file:
            json.dump(about, file, indent=1)
    return about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded demo corpus.")
    for name, parameter in inspect.signature(make).parameters.items():
        parser.add_argument(f"--{name}", type=type(parameter.default), default=parameter.default)
    print(json.dumps(make(**vars(parser.parse_args())), indent=1))
