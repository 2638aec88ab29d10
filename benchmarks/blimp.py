"""BLiMP: of two sentences that differ in one point of grammar, the model should prefer the acceptable one."""
from benchmarks.report import OTHER_MEASURE, accuracy, by_group, right_by
from runtime.files import find_files, parse_json, read_text

KEYS = dict(good="sentence_good", bad="sentence_bad", field="field", phenomenon="linguistics_term", paradigm="UID")


def read(folder):
    """[{good, bad, field, phenomenon, paradigm}] of the .jsonl files in a folder. ValueError names file and line."""
    files, items = find_files(folder, [".jsonl"]), []
    if not files:
        raise ValueError(f"{folder}: no .jsonl files; give the folder of BLiMP's 67")
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            record = parse_json(line, f"{file}:{number}", dict)
            for key in KEYS.values():
                value = record.get(key)
                if not isinstance(value, str) or not value.strip() or not value.isprintable():
                    raise ValueError(f"{file}:{number}: not an item of BLiMP ({key} is not a line of text)")
            items.append({name: record[key] for name, key in KEYS.items()})
    if not items:
        raise ValueError(f"{folder}: no items in its .jsonl files; give the folder of BLiMP's 67")
    return items


def score(evaluator, folder, protocol):
    """Accuracy over all pairs, by field, by phenomenon and by paradigm."""
    pairs = read(folder)
    evaluator.used += find_files(folder, [".jsonl"])
    encode, start = evaluator.tokenizer.encode, [evaluator.tokenizer.eos] if protocol["bos"] else []
    sequences = []
    for pair in pairs:
        sequences += [start + encode(pair["good"]), start + encode(pair["bad"])]
    spans = [(1, len(sequence)) for sequence in sequences]
    total, count = evaluator.log_likelihood(sequences, spans)

    measure, other = protocol["score"], OTHER_MEASURE[protocol["score"]]
    answers = right_by(total, count, protocol["ties"])
    right = answers[measure]
    result = dict(accuracy(right), **{f"by_{other}": accuracy(answers[other])["accuracy"]})
    for key in ("field", "phenomenon", "paradigm"):
        result[f"by_{key}"] = by_group(right, [pair[key] for pair in pairs])
    return result, dict(right=right, total=total, tokens=count)
