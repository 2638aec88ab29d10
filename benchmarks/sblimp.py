"""sBLIMP of ZeroSpeech 2021 (task sLM21): the task of BLiMP with spoken sentences in several voices."""
from pathlib import Path

import numpy as np

from benchmarks.hear import hear_files
from benchmarks.report import OTHER_MEASURE, accuracy, best_is, by_group
from data import prompt_sequence
from runtime.files import find_files, read_csv


def read(path):
    """The rows of a gold.csv as dicts, in which each sentence has a counterpart. ValueError names file and fault."""
    rows = read_csv(path, ("id", "filename", "voice", "type", "subtype", "correct"))
    filenames, sentences = set(), set()
    for number, row in rows:
        if row["correct"] not in ("0", "1"):
            raise ValueError(f"{path}:{number}: not a row of sBLIMP's gold.csv (correct is {row['correct'][:60]!r})")
        sentence = row["type"], row["subtype"], row["id"], row["voice"], int(row["correct"])
        if row["filename"] in filenames or sentence in sentences:
            raise ValueError(f"{path}:{number}: a second row for {row['filename'][:200]!r} or {sentence}")
        filenames.add(row["filename"])
        sentences.add(sentence)
    for *pair, correct in sorted(sentences):
        if (*pair, 1 - correct) not in sentences:
            raise ValueError(f"{path}: missing the counterpart of {(*pair, correct)}")
    return [row for _, row in rows]


def table(rows, scores, ties="share"):
    """(result, answers float64 [pairs]) from the rows of gold.csv and {filename: score}.

    The answer to a pair is averaged over voices. `accuracy` is the mean over pairs, as on the leaderboard.
    `by_type_mean` is the unweighted mean over types, as in the authors' release.
    """
    spoken = {}  # {(pair, voice): [score of the right sentence, score of the wrong one]}
    for row in rows:
        pair = (row["type"], row["subtype"], row["id"])
        both = spoken.setdefault((pair, row["voice"]), [0.0, 0.0])
        both[1 - int(row["correct"])] = scores[row["filename"]]
    answers = best_is(np.array([*spoken.values()]), 0, ties)
    by_pair = {}
    for (pair, _), answer in zip(spoken, answers):
        by_pair.setdefault(pair, []).append(answer)
    right = np.array([np.mean(of_voices) for of_voices in by_pair.values()])

    by_type = by_group(right, [kind for kind, _, _ in by_pair])
    by_type_mean = float(np.mean([group["accuracy"] for group in by_type.values()]))
    by_voice = by_group(answers, [voice for _, voice in spoken])
    return dict(accuracy(right), by_type_mean=by_type_mean, by_type=by_type, by_voice=by_voice), right


def score(evaluator, folder, protocol):
    """Results of dev, and of test where it has a gold.csv. Writes submission files for both."""
    result, items = {}, {}
    for split in ("dev", "test"):
        if (part := Path(folder) / "syntactic" / split).is_dir():
            found, arrays = score_split(evaluator, part, protocol)
            result |= {split: found} if found else {}
            items |= {f"{split}.{name}": array for name, array in arrays.items()}
    if not items:
        raise ValueError(f"{folder}: no syntactic/dev or syntactic/test inside")
    return result, items


def score_split(evaluator, folder, protocol):
    """(result, arrays) for one folder, dev or test. Without a gold.csv the result is None."""
    gold, files = folder / "gold.csv", {path.stem: path for path in find_files(folder, [".wav"])}
    rows = read(gold) if gold.exists() else []
    if not files:
        raise ValueError(f"{folder}: no wavs here")
    for row in rows:
        if row["filename"] not in files:
            raise ValueError(f"{folder / row['filename']}.wav: missing, though gold.csv names it")
    evaluator.used += [gold] if rows else []

    sequences, spans = [], []
    for units in hear_files(evaluator, list(files.values())):
        sequence, span = prompt_sequence([], units, ("speech", "speech"), evaluator.model.config, protocol["bos"])
        sequences.append(sequence)
        spans.append(span)
    total, count = evaluator.log_likelihood(sequences, spans, folder.name)
    arrays = dict(total=total, tokens=count)

    measure, other = protocol["score"], OTHER_MEASURE[protocol["score"]]
    means = total / np.maximum(count, 1)
    scores = dict(sum=dict(zip(files, total.tolist())), mean=dict(zip(files, means.tolist())))
    if evaluator.world.rank == 0:
        submission = evaluator.path.with_name(f"{evaluator.path.stem}.sblimp.{folder.name}.txt")
        lines = [f"{name} {value!r}\n" for name, value in scores[measure].items()]
        submission.write_text("".join(lines), encoding="utf-8")
    if not rows:
        return None, arrays
    result, right = table(rows, scores[measure], protocol["ties"])
    result[f"by_{other}"] = table(rows, scores[other], protocol["ties"])[0]["accuracy"]
    return result, arrays | dict(right=right)
