"""
The parts of a data set on disk. A run that was killed resumes after the last part that it finished.

A shard is written in parts, OUT/shard-0-of-8-00000 and so on. Each part is a data set (see runtime/datasets.py), and
all parts in OUT together are one sharded set. A part is written under another name and then renamed, so it appears
whole or not at all. It holds two more files:

    part.json      its record: the settings it was made with, the items it covers, counts, seconds
    dropped.jsonl  {id, reason} of each item that could not be used

Items come in blocks of a fixed size. A part takes whole blocks until it has enough tokens. Only the items decide where
a part ends, so the data is the same however often a run is interrupted.
"""

import itertools
import json
import os
import shutil
import time
from collections import Counter
from typing import NamedTuple

from runtime.datasets import STREAMS, write_set
from runtime.files import read_json, replace_file

# What these settings were, in effect, for sets that were made before they existed
BEFORE_THEY_EXISTED = dict(max_tokens=0, val_share=0.0, split="train", shard_by="items")


class Document(NamedTuple):
    content: object  # as write_set takes it: ids, or (token ids of each word, units of each word)
    counts: dict  # size (in tokens, without EOS), hours of audio, words, bytes of text


class Bad(NamedTuple):
    """An item that cannot be used."""
    id: str
    error: ValueError  # "REASON: details"


def finished_parts(out, shard, n_shards, identity):
    """Return the records of a shard's finished parts, in order, and remove an unfinished part.

    Raises SystemExit if OUT holds parts of other settings, or if a part is missing.
    """
    mine, next_item, shard_name = [], 0, f"shard-{shard}-of-{n_shards}-"
    for path in sorted(out.glob("*/part.json")):
        record = read_json(path)
        for key, value in identity.items():
            before = (BEFORE_THEY_EXISTED | record["identity"]).get(key)
            if value != before:
                raise SystemExit(f"{path.parent}: was made with {key} {before!r}, now it is {value!r}; "
                                 f"use the same again or another --out")
        if path.parent.name.startswith(shard_name):
            if record["first"] != next_item:
                raise SystemExit(f"{path.parent}: the part before it is missing; remove this one and all later ones, "
                                 f"and start again")
            next_item = record["next"]
            mine.append(record)
    for folder in out.glob(f".unfinished-{shard_name}*"):
        shutil.rmtree(folder)
    return mine


def write_part(folder, first, blocks, part_tokens, kind, tokenizer, units, identity):
    """Write the next part of a shard, and return its record.

    first: number of its first item in the shard. blocks: an iterator of (Document or Bad for each item, seconds spent
    in each stage, whether this is the last block). tokenizer, units: for write_set. identity: from identify().
    """
    began = time.perf_counter()
    counts = Counter(items=0, documents=0, hours=0.0, words=0, bytes=0)
    record, dropped, seconds = dict(identity=identity, first=first, last=True), [], Counter()

    def take_documents():
        for results, its_seconds, is_last in blocks:
            for result in results:
                counts["items"] += 1
                if isinstance(result, Bad):
                    dropped.append(dict(id=result.id, reason=str(result.error)))
                else:
                    counts.update(result.counts, documents=1)
                    yield result.content
            seconds.update(its_seconds)
            record["last"] = is_last
            if counts["size"] >= part_tokens:
                return

    unfinished = folder.parent / f".unfinished-{folder.name}" / folder.name  # open_source does not look this deep
    documents, tokens = take_documents(), {}
    one = next(documents, None)
    if one is not None:
        meta = write_set(unfinished, kind, itertools.chain([one], documents), tokenizer, units,
                         f"corpora/{identity['corpus']}.py")
        tokens = {stream: meta[stream]["tokens"] for stream in STREAMS[kind]}
    elif counts["items"] or identity["shards"] > 1:  # no good item is left, so the part is only their record
        unfinished.mkdir(parents=True)
    else:
        raise SystemExit(f"{folder}: no items found, at least none for this shard; see --source and --shard")
    del counts["size"]
    reasons = Counter(line["reason"].partition(":")[0] for line in dropped)
    seconds["all"] = time.perf_counter() - began
    record |= dict(next=first + counts["items"], **counts, tokens=tokens, dropped=reasons, seconds=seconds)
    (unfinished / "dropped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dropped))
    (unfinished / "part.json").write_text(json.dumps(record, indent=1))
    os.rename(unfinished, folder)
    unfinished.parent.rmdir()
    return record


def write_report(path, about, records):
    """Write a report and return it: the dict `about`, then the sums over the records of a shard's parts."""
    report = about | dict(parts=len(records))
    for key in ("items", "documents", "hours", "words", "bytes"):
        report[key] = sum(record[key] for record in records)
    for key in ("tokens", "dropped", "seconds"):
        report[key] = dict(sum((Counter(record[key]) for record in records), Counter()))
    replace_file(path, json.dumps(report, indent=1))
    return report
