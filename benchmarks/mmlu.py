"""MMLU, zero-shot, in SmolLM's cloze form: the choices themselves are scored as continuations of the question."""
from pathlib import Path

import numpy as np

from benchmarks.report import best_is, by_group, over_groups
from runtime.files import read_csv

PROMPT = "The following are questions about {subject}.\nQuestion: {question}\nAnswer:"


def read(path):
    """[{subject, question, choices, answer}] of a .csv or .csv.xz file. answer is the index of the right choice.

    The file has the columns subject, question, A, B, C, D and answer (a letter or an index). ValueError names file and
    item.
    """
    items, columns = [], ("subject", "question", *"ABCD", "answer")
    for number, (_, row) in enumerate(read_csv(path, columns), 1):
        answer = row["answer"].strip()
        if answer not in [*"ABCD0123"] or not all(row[key].strip() for key in columns):
            raise ValueError(f"{path}: item {number}: not an item of MMLU; its answer is {answer[:60]!r}, and it needs"
                             f" A to D and no empty field")
        items.append(dict(subject=row["subject"], question=row["question"], choices=[row[key] for key in "ABCD"],
                          answer="ABCD0123".index(answer) % 4))
    return items


def score(evaluator, path, protocol):
    """acc (by summed log-likelihood) and acc_norm (by sum per character): means over subjects, and for each subject."""
    items = read(path)
    evaluator.used.append(Path(path))
    tokenizer, longest = evaluator.tokenizer, evaluator.model.config.max_position_embeddings
    start = [tokenizer.eos] if protocol["bos"] else []
    sequences, spans, cut = [], [], 0
    for item in items:
        prompt = PROMPT.format(subject=item["subject"].replace("_", " "), question=item["question"])
        context = start + tokenizer.encode(prompt)
        choices = [tokenizer.encode(" " + choice) for choice in item["choices"]]
        room = longest + 1 - max(map(len, choices))  # the last token of a sequence is a target only
        cut += len(context) > room
        context = context[-room:]  # a question that is too long loses its beginning, for all its choices
        for choice in choices:
            sequences.append(context + choice)
            spans.append((len(context), len(context) + len(choice)))
    total, count = evaluator.log_likelihood(sequences, spans)

    scores = total.reshape(-1, 4)  # [items, choices]
    characters = np.array([[len(choice) for choice in item["choices"]] for item in items])
    answer, subjects = np.array([item["answer"] for item in items]), [item["subject"] for item in items]
    result, arrays = dict(cut_questions=cut), {}
    for name, measure in (("acc_norm", scores / characters), ("acc", scores)):
        right = best_is(measure, answer, protocol["ties"])
        result[name] = over_groups(right, subjects)
        result[f"{name}_by_subject"] = by_group(right, subjects)
        arrays[f"{name}.right"] = right
    return result, arrays | dict(total=scores, tokens=count)
