"""
StoryCloze, Topic-StoryCloze and the demo's Topic-Cloze: given a context, which of two endings is the true one?

A story is (context, right ending, wrong ending). Each part is {"text": ids, "speech": units in the model's id space}.
"""
import re
from pathlib import Path

from benchmarks.hear import hear_files
from benchmarks.report import OTHER_MEASURE, accuracy, right_by
from data import prompt_sequence, uniform
from runtime.datasets import open_set
from runtime.files import DataError, find_files, read_text

# the modalities of context and ending in each setting
MODALITIES = {"T": ("text", "text"), "S": ("speech", "speech"), "T->S": ("text", "speech"), "S->T": ("speech", "text")}
PREFIX = (1 << 32) + 1  # stage number for drawing other stories; no training stage has this number


# ---------------------------------------------------------------------------------------------------------------------
# reading stories

def read(folder):
    """(whole, cross): the files of a folder in TWIST's layout or in slamkit's cross-modal layout. One of them is empty.

    whole   [right, wrong, right, wrong ..] wavs of whole stories
    cross   {"speech" or "text": [context, right, wrong, context ..]} wavs or texts, the same stories in the same order

    ValueError names the file that is missing or misnamed.
    """
    wavs, texts = find_files(folder, [".wav"]), find_files(folder, [".txt"])
    if not any(path.stem.endswith("_mutual") for path in (*wavs, *texts)):
        return twist_files(folder, wavs), {}
    cross = {}
    for modality, files in (("speech", wavs), ("text", texts)):
        by_name = {str(path.with_suffix("")): path for path in files}  # with its folder, without its ending
        matches = [re.fullmatch("(.*)_(?:mutual|correct|incorrect)", name) for name in by_name]
        stories = sorted({match[1] for match in matches if match})
        parts = [f"{story}_{part}" for story in stories for part in ("mutual", "correct", "incorrect")]
        for name in parts:
            if name not in by_name:
                raise ValueError(f"{name}{files[0].suffix}: missing; a story is X_mutual, X_correct and X_incorrect")
        if parts:  # a folder may hold one modality alone
            cross[modality] = [by_name[name] for name in parts]
    spoken, written = ({path.with_suffix("") for path in cross.get(key, ())} for key in ("speech", "text"))
    if spoken and written and spoken != written:
        raise ValueError(f"{min(spoken ^ written)}: as .wav or as .txt alone; here each story needs both")
    return [], cross


def twist_files(folder, files):
    """[right, wrong, right, wrong ..] of {2k}_STORY_correct.wav and {2k+1}_STORY_incorrect.wav."""
    by_number = {}
    for path in files:
        match = re.fullmatch(r"(\d+)_(?:.*_)?(correct|incorrect)", path.stem)
        number = int(match[1]) if match else None
        if not match or number in by_number or (match[2] == "correct") != (number % 2 == 0):
            raise ValueError(f"{path}: misnamed; story k is 2k_STORY_correct.wav and 2k+1_STORY_incorrect.wav")
        by_number[number] = path
    if not files:
        raise ValueError(f"{folder}: no wavs here")
    for number, path in by_number.items():
        if number ^ 1 not in by_number:
            raise ValueError(f"{path}: missing its counterpart, number {number ^ 1}")
    return [by_number[number] for number in sorted(by_number)]


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
            text, units, _, _ = cloze_set.document(document)  # each ends with EOS
            story.append(dict(text=text[:-1].tolist(), speech=(units[:-1] + config.vocab_size).tolist()))
        stories.append(story)
    return stories


def encode_whole(evaluator, files):
    """Stories in TWIST's layout. The context is empty, and the ending is the whole story."""
    heard = hear_files(evaluator, files)
    return [({"speech": []}, {"speech": right}, {"speech": wrong}) for right, wrong in zip(heard[::2], heard[1::2])]


def encode_cross(evaluator, cross):
    """Stories in slamkit's layout, in the modalities that exist. Context and endings are encoded separately."""
    encoded = {}  # {modality: ids of each part}
    for modality, files in cross.items():
        if modality == "text":
            texts = [" ".join(read_text(path).split()) for path in files]
            if "" in texts:
                raise ValueError(f"{files[texts.index('')]}: empty text")
            # Every third text is a context. An ending begins with the space between context and ending.
            encoded["text"] = [evaluator.tokenizer.encode(" " + text if i % 3 else text)
                               for i, text in enumerate(texts)]
            evaluator.used += files
        elif evaluator.has_speech:
            encoded["speech"] = hear_files(evaluator, files)
    parts = [dict(zip(encoded, ids)) for ids in zip(*encoded.values())]
    return list(zip(parts[::3], parts[1::3], parts[2::3]))


# ---------------------------------------------------------------------------------------------------------------------
# scoring

def story_sequences(stories, setting, protocol, config, seed=1):
    """(sequences, spans) for log_likelihood: each story with its right ending, then with its wrong ending."""
    before, after = MODALITIES[setting]
    sequences, spans = [], []
    for i, (context, *endings) in enumerate(stories):
        for which, ending in enumerate(endings):
            prefix = []
            if protocol["prefix"] and setting == "S->T":
                other = other_story(stories, i, which, seed)
                prefix = [*other[0]["text"], *other[1]["text"], config.eos_token_id][-protocol["prefix"]:]
            sequence, span = prompt_sequence(context[before], ending[after], (before, after), config, protocol["bos"],
                                             protocol["span"] == "whole", prefix)
            sequences.append(sequence)
            spans.append(span)
    return sequences, spans


def other_story(stories, i, which, seed):
    """A random story other than story i, drawn anew for each of its endings. ValueError if there is none."""
    if len(stories) < 2:
        raise ValueError("protocol: prefix needs more than one story")
    step = 1 + int(uniform(seed, PREFIX, i, which) * (len(stories) - 1))
    return stories[(i + step) % len(stories)]


def score(evaluator, folder, protocol):
    """({setting: accuracy}, arrays) for a folder of sound files and texts, or for a paired data set."""
    if (Path(folder) / "meta.json").exists():
        return score_paired(evaluator, folder, protocol)
    whole, cross = read(folder)
    if not evaluator.has_speech and "text" not in cross:
        raise ValueError(f"{folder}: nothing here that a text model can score")
    if not whole:
        return score_stories(evaluator, encode_cross(evaluator, cross), protocol)
    evaluator.notes["span"] = "whole"
    return score_stories(evaluator, encode_whole(evaluator, whole), protocol | dict(span="whole"))


def score_paired(evaluator, folder, protocol):
    """({setting: accuracy}, arrays) for a paired data set."""
    folder = Path(folder)
    stories = paired_stories(open_set(folder, *evaluator.made_with), evaluator.model.config)
    evaluator.used += sorted([folder / "meta.json", *folder.glob("*.npy")])
    return score_stories(evaluator, stories, protocol)


def score_stories(evaluator, stories, protocol):
    """({setting: accuracy}, arrays) for the settings whose modalities both the stories and the model have."""
    result, items = {}, {}
    measure, other = protocol["score"], OTHER_MEASURE[protocol["score"]]
    for setting, modalities in MODALITIES.items():
        if not (stories[0][0].keys() >= {*modalities} and (setting == "T" or evaluator.has_speech)):
            continue
        sequences, spans = story_sequences(stories, setting, protocol, evaluator.model.config, evaluator.settings.seed)
        total, count = evaluator.log_likelihood(sequences, spans, setting)
        answers = right_by(total, count, protocol["ties"])
        result[setting] = accuracy(answers[measure])
        evaluator.notes[f"{setting} by {other}"] = accuracy(answers[other])["accuracy"]
        items |= {f"{setting}.right": answers[measure], f"{setting}.total": total, f"{setting}.tokens": count}
    return result, items
