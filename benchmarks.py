"""
Benchmarks of others as they lie on disk: each reader returns plain lists and dicts, or raises ValueError with one line.

    BLiMP         FOLDER/*.jsonl: sentence_good, sentence_bad, field, linguistics_term, UID (Warstadt et al., 2020)
    MMLU          .csv, .csv.xz: subject, question, A, B, C, D, answer (Hendrycks et al., 2021)
    sBLIMP        FOLDER/syntactic/{dev,test}/NAME.wav, gold.csv: id, filename, voice, type, subtype, correct,
                  transcription (ZeroSpeech 2021, sLM21)
    StoryCloze    {2k}_STORY_correct.wav, {2k+1}_STORY_incorrect.wav (TWIST: whole stories), or
                  X_{mutual,correct,incorrect}.{wav,txt} (slamkit's cross-modal form: context and endings apart)
"""
import csv
import hashlib
import io
import re
from pathlib import Path

from checkpoint import digest
from foreign import one_line, parse_json, read_bytes


def read_text(path):
    """The text of a file in UTF-8, out of an .xz too; ValueError."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None


def read_rows(path, columns):
    """[(line, {column: text})] of a .csv(.xz) with these columns; ValueError names line and fault."""
    reader, rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        header = next(reader, [])
        if missing := [column for column in columns if header.count(column) != 1]:
            raise ValueError(f"{path}: no one column {missing[0]}; it needs {', '.join(columns)}")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields, {len(header)} columns")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no csv ({one_line(error)})") from None
    if not rows:
        raise ValueError(f"{path}: no items")
    return rows


def read_blimp(folder):
    """[{good, bad, field, phenomenon, paradigm}] from BLiMP's folder of .jsonl files. ValueError names the line."""
    names = dict(good="sentence_good", bad="sentence_bad", field="field", phenomenon="linguistics_term", paradigm="UID")
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: no .jsonl files; give the folder of BLiMP's 67")
    items = []
    for file in files:
        for number, line in enumerate(read_text(file).removesuffix("\n").split("\n"), 1):
            said = parse_json(line, f"{file}:{number}", dict)
            for name in names.values():
                if not isinstance(said.get(name), str) or not said[name].isprintable():
                    raise ValueError(f"{file}:{number}: not an item of BLiMP ({name} is no line of text)")
                if not said[name].strip():
                    raise ValueError(f"{file}:{number}: empty sentence: {name}")
            items.append({key: said[name] for key, name in names.items()})
    return items


def read_mmlu(path):
    """[{subject, question, choices, answer (index)}] of a .csv(.xz) with columns subject, question, A .. D, answer.

    answer: the letter or the index. ValueError names file and item.
    """
    items = []
    for number, (_, said) in enumerate(read_rows(path, ("subject", "question", *"ABCD", "answer")), 1):
        answer = said["answer"].strip()
        if answer not in [*"ABCD", *"0123"]:
            raise ValueError(f"{path}: item {number}: not an item of MMLU (answer {answer[:60]!r}: not A to D)")
        for key in ("subject", "question", *"ABCD"):
            if not said[key].strip():
                raise ValueError(f"{path}: item {number}: empty {key}")
        items.append(dict(subject=said["subject"], question=said["question"], choices=[said[key] for key in "ABCD"],
                          answer="ABCD0123".index(answer) % 4))
    return items


def read_sblimp(path):
    """Rows of ZeroSpeech's gold.csv as dicts; ValueError naming file, line and fault."""
    rows = read_rows(path, ("id", "filename", "voice", "type", "subtype", "correct"))
    names, sentences = set(), set()
    for number, row in rows:
        if row["correct"] not in ("0", "1"):
            raise ValueError(f"{path}:{number}: not a row of sBLIMP's gold.csv (correct is {row['correct'][:60]!r})")
        key = (row["type"], row["subtype"], row["id"], row["voice"], int(row["correct"]))
        if row["filename"] in names:
            raise ValueError(f"{path}:{number}: filename {row['filename'][:200]!r} stands here a second time")
        if key in sentences:
            raise ValueError(f"{path}:{number}: a second sentence {key}")
        if not (row.get("transcription") or "-").strip():
            raise ValueError(f"{path}:{number}: empty sentence")
        names.add(row["filename"])
        sentences.add(key)
    for row in sorted(sentences):
        if (*row[:4], 1 - row[4]) not in sentences:
            raise ValueError(f"{path}: missing the counterpart of {row}")
    return [row for _, row in rows]


def find_stories(folder):
    """(whole, cross) of a folder, one of them empty: the stories in TWIST's layout or in slamkit's cross-modal one.

    whole   [(right, wrong)] wavs of whole stories
    cross   {"speech" or "text": [(context, right, wrong)]} wavs or texts, the same stories in the same order
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".wav", ".txt"))
    names = sorted({str(path)[:-len("_mutual.wav")] for path in files if path.stem.endswith("_mutual")})
    if not names:
        return twist_pairs(folder, [path for path in files if path.suffix == ".wav"]), {}
    cross, there = {}, set(files)
    for modality, suffix in (("speech", ".wav"), ("text", ".txt")):
        stories = [tuple(Path(f"{x}_{part}{suffix}") for part in ("mutual", "correct", "incorrect")) for x in names]
        missing = [path for story in stories for path in story if path not in there]
        if len(missing) < 3 * len(names):  # a folder may hold one modality alone
            if missing:
                raise ValueError(f"{missing[0]}: missing; a story is X_mutual, X_correct and X_incorrect{suffix}")
            cross[modality] = stories
    return [], cross


def twist_pairs(folder, files):
    """[(right, wrong)] of {2k}_STORY_correct.wav and {2k+1}_STORY_incorrect.wav."""
    by_number = {}
    for path in files:
        found = re.fullmatch(r"(\d+)_(?:.*_)?(correct|incorrect)", path.stem)
        if not found:
            raise ValueError(f"{path}: not NUMBER_STORY_correct.wav or NUMBER_STORY_incorrect.wav")
        number = int(found[1])
        if number in by_number:
            raise ValueError(f"{path}: a second file with number {number} beside {by_number[number].name}")
        if (found[2] == "correct") != (number % 2 == 0):
            raise ValueError(f"{path}: even numbers are correct, odd ones incorrect")
        by_number[number] = path
    if not files:
        raise ValueError(f"{folder}: no wavs here")
    for number, path in by_number.items():
        if number ^ 1 not in by_number:
            raise ValueError(f"{path}: missing its counterpart, number {number ^ 1}")
    return [(by_number[n], by_number[n + 1]) for n in sorted(by_number) if n % 2 == 0]


def read_line(path):
    """A text file as one line."""
    words = " ".join(read_text(path).split())
    if not words:
        raise ValueError(f"{path}: empty text")
    return words


def fingerprint(files):
    """One line for many files: their number, and a hash over names and contents."""
    lines = sorted(f"{digest(path)} {path.name}" for path in set(files))
    return dict(number=len(lines), sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())
