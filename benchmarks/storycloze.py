"""
StoryCloze, Topic-StoryCloze and the demo's Topic-Cloze: given a context, which of two endings is the true one?

A story is (context, right ending, wrong ending). Each part is {"text": ids, "speech": units in the model's id space}.
"""
import re
from pathlib import Path

import numpy as np

from benchmarks.hear import hear_files
from benchmarks.report import OTHER_MEASURE, accuracy, right_by
from data import prompt_sequence, uniform
from runtime.datasets import open_set
from runtime.files import DataError, read_text

# the modalities of context and ending in each setting
MODALITIES = {"T": ("text", "text"), "S": ("speech", "speech"), "T->S": ("text", "speech"), "S->T": ("speech", "text")}
PREFIX = (1 << 32) + 1  # random prefixes are drawn under this stage number, which no stage of training has


# ---------------------------------------------------------------------------------------------------------------------
# how stories lie on disk

def read(folder):
    """(whole, cross) of a folder, one of them empty: the stories in TWIST's layout, or in slamkit's cross-modal one.

    whole   [(right, wrong)] wavs of whole stories
    cross   {"speech" or "text": [(context, right, wrong)]} wavs or texts, the same stories in the same order

    ValueError names the file that is missing or misnamed.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".wav", ".txt"))
    names = sorted({str(path)[:-len("_mutual.wav")] for path in files if path.stem.endswith("_mutual")})
    if not names:
        return twist_pairs(folder, [path for path in files if path.suffix == ".wav"]), {}
    cross, present = {}, set(files)
    for modality, suffix in (("speech", ".wav"), ("text", ".txt")):
        stories = [tuple(Path(f"{name}_{part}{suffix}") for part in ("mutual", "correct", "incorrect"))
                   for name in names]
        missing = [path for story in stories for path in story if path not in present]
        if len(missing) == 3 * len(names):
            continue  # a folder may hold one modality alone
        if missing:
            raise ValueError(f"{missing[0]}: missing; a story is X_mutual, X_correct and X_incorrect{suffix}")
        cross[modality] = stories
    return [], cross


def twist_pairs(folder, files):
    """[(right, wrong)] of {2k}_STORY_correct.wav and {2k+1}_STORY_incorrect.wav."""
    by_number = {}
    for path in files:
        match = re.fullmatch(r"(\d+)_(?:.*_)?(correct|incorrect)", path.stem)
        if not match:
            raise ValueError(f"{path}: not NUMBER_STORY_correct.wav or NUMBER_STORY_incorrect.wav")
        number = int(match[1])
        if number in by_number:
            raise ValueError(f"{path}: a second file with number {number} beside {by_number[number].name}")
        if (match[2] == "correct") != (number % 2 == 0):
            raise ValueError(f"{path}: even numbers are correct, odd ones incorrect")
        by_number[number] = path
    if not files:
        raise ValueError(f"{folder}: no wavs here")
    for number, path in by_number.items():
        if number ^ 1 not in by_number:
            raise ValueError(f"{path}: missing its counterpart, number {number ^ 1}")
    return [(by_number[number], by_number[number + 1]) for number in sorted(by_number) if number % 2 == 0]


def paired_stories(cloze_set, config, items=None):
    """Stories of a paired data set whose documents come in threes: opening, true ending, another story's ending.

    items: the indices of the stories to take; None: all
    """
    n = cloze_set.meta["documents"]
    if n % 3:
        raise DataError(f"{cloze_set.folder}: {n} documents; a cloze set has them in threes")
    stories = []
    for item in range(n // 3) if items is None else items:
        story = []
        for document in range(3 * item, 3 * item + 3):
            text, units, _, _ = cloze_set.document(document)
            without_eos = dict(text=text[:-1].tolist(), speech=(units[:-1] + config.vocab_size).tolist())
            story.append(without_eos)
        stories.append(story)
    return stories


def encode_whole(evaluator, pairs):
    """Stories of TWIST's layout: they have no context apart, so everything is ending."""
    heard = hear_files(evaluator, [path for pair in pairs for path in pair])
    return [({"speech": []}, {"speech": right}, {"speech": wrong}) for right, wrong in zip(heard[::2], heard[1::2])]


def encode_cross(evaluator, cross):
    """Stories of slamkit's layout, with the modalities that are there. Context and endings are encoded apart."""
    stories = [({}, {}, {}) for _ in next(iter(cross.values()))]
    for modality, its_stories in cross.items():
        files = [path for story in its_stories for path in story]
        if modality == "speech":
            ids = hear_files(evaluator, files)
        else:
            texts = [" ".join(read_text(path).split()) for path in files]
            for path, text in zip(files, texts):
                if not text:
                    raise ValueError(f"{path}: empty text")
            # every third text is a context; an ending carries the space that follows the context
            ids = [evaluator.tokenizer.encode(" " + text if i % 3 else text) for i, text in enumerate(texts)]
            evaluator.used += files
        for i, part in enumerate(ids):
            stories[i // 3][i % 3][modality] = part
    return stories


# ---------------------------------------------------------------------------------------------------------------------
# scoring

def story_sequences(stories, setting, protocol, config, seed=1):
    """(sequences, spans) for log_likelihood: of each story the right ending after the context, then the wrong one."""
    before, after = MODALITIES[setting]
    sequences, spans = [], []
    for i, (context, *endings) in enumerate(stories):
        draws = uniform(seed, PREFIX, i, np.arange(protocol["prefix"] if setting == "S->T" else 0))
        prefix = (draws * config.vocab_size).astype(np.int64).tolist()
        for ending in endings:
            sequence, span = prompt_sequence(context[before], ending[after], (before, after), config, protocol["bos"],
                                            protocol["span"] == "whole", prefix)
            sequences.append(sequence)
            spans.append(span)
    return sequences, spans


def score(evaluator, folder, protocol):
    """{setting: accuracy}, and the answers, of a folder of sound files and texts or of a paired data set."""
    if (Path(folder) / "meta.json").exists():
        return score_paired(evaluator, folder, protocol)
    whole, cross = read(folder)
    if whole:
        evaluator.notes["span"] = "whole"
        return score_stories(evaluator, folder, {"S": encode_whole(evaluator, whole)}, protocol | dict(span="whole"))
    stories = encode_cross(evaluator, cross)
    possible = [setting for setting, modalities in MODALITIES.items() if cross.keys() >= {*modalities}]
    return score_stories(evaluator, folder, dict.fromkeys(possible, stories), protocol)


def score_paired(evaluator, folder, protocol):
    """{setting: accuracy}, and the answers, of a paired data set."""
    folder = Path(folder)
    stories = paired_stories(open_set(folder, *evaluator.made_with), evaluator.model.config)
    evaluator.used += sorted([folder / "meta.json", *folder.glob("*.npy")])
    return score_stories(evaluator, folder, dict.fromkeys(MODALITIES, stories), protocol)


def score_stories(evaluator, folder, stories, protocol):
    """({setting: accuracy}, arrays) from {setting: stories}."""
    result, items = {}, {}
    measure, other = protocol["score"], OTHER_MEASURE[protocol["score"]]
    for setting in stories:
        if setting != "T" and not evaluator.has_speech:
            continue
        sequences, spans = story_sequences(stories[setting], setting, protocol, evaluator.model.config,
                                           evaluator.settings.seed)
        total, count = evaluator.log_likelihood(sequences, spans, setting, candidates=2)
        answers = right_by(total, count, protocol["ties"])
        result[setting] = accuracy(answers[measure])
        evaluator.notes[f"{setting} by {other}"] = accuracy(answers[other])["accuracy"]
        items |= {f"{setting}.right": answers[measure], f"{setting}.total": total, f"{setting}.tokens": count}
    if not result:
        raise ValueError(f"{folder}: nothing here that a text model can score")
    return result, items
