"""
Every score of the paper's Tables 1, 2 and 7, and the demo's, of a checkpoint or of a plain SmolLM folder (text only).

    python evaluate.py --checkpoint=out/train_tiny                               held-out NLL and Topic-Cloze
    python evaluate.py --checkpoint=weights/smollm-135m --tasks='["blimp","mmlu"]' --blimp=blimp/data --mmlu=mmlu.csv
    torchrun --nproc_per_node=4 evaluate.py --checkpoint=out/train_150m --before=weights/smollm-135m --mmlu=mmlu.csv \\
        --units=units/mhubert --sblimp=zerospeech2021 --tstorycloze=tSC --sstorycloze=sSC \\
        --librispeech='["data/librispeech-dev"]'
    python evaluate.py --checkpoint=A --versus=B       the same for B, and whether the two differ

Tasks, and the protocol of each; --protocol.TASK.KEY=VALUE changes it, and every result says what it was made with.

    blimp        BLiMP, 67 paradigms of 1000 pairs: of two sentences the one with the higher log-likelihood is chosen
    sblimp       ZeroSpeech 2021 sLM21: the same with spoken sentences, mean log-likelihood of their units. A pair is
                 averaged over its voices, then over pairs (accuracy, the leaderboard's) or over types, unweighted
                 (by_type_mean, the authors'). Submission files evaluation.sblimp.SPLIT.txt: `filename score`
    tstorycloze  Topic-StoryCloze and StoryCloze in settings T, S, T->S, S->T, context -> ending, each written (T) or
    sstorycloze  spoken (S): the ending with the higher mean log-likelihood given the context. Three layouts:
                 TWIST's wavs (whole stories: S only, the whole utterance is scored), slamkit's cross-modal form
                 (context and endings apart, and encoded apart), or a paired data set as for topic_cloze
    topic_cloze  the demo's: a paired data set, documents in threes: opening, true ending, another story's ending.
    mmlu         zero-shot, SmolLM's cloze form: "The following are questions about SUBJECT.\\nQuestion: Q\\nAnswer:",
                 " CHOICE". acc: highest summed log-likelihood; acc_norm: highest sum per character of the choice. Mean
                 over subjects. --before=FOLDER scores that model too, the table's "pre"
    librispeech  NLL per unit (text: per token, and perplexity) of a data set's documents, each by itself; one that is
    text         longer than the context is read in windows that overlap by half
    nll          NLL of random windows of held-out sets, drawn as in training

benchmarks.py says how they lie on disk.

    score   "sum" or "mean" over the scored tokens, what is compared (the other is reported beside it)
    span    "continuation", or "whole": context too (slamkit's)
    ties    among k best candidates: "share" (1/k if the right one is among them), "wrong" or "first" (the first wins)
    bos     does the EOS of its modality stand before a sequence, as in training? If not, the first token is not scored
    prefix  random text tokens before the context in S->T: 0, or 10 as the authors' release has it, unlike their paper

Everywhere: the EOS that ends a document is not scored; one switch token stands where the modality changes and is never
scored; beginnings that sequences share are computed once, which changes nothing but time (see `pack`).
Standard errors are over items. Two checkpoints: exact McNemar test where all answers are right or wrong, otherwise a
paired bootstrap.
"""
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model as smoltolk
import speech
from benchmarks import find_stories, fingerprint, read_blimp, read_line, read_mmlu, read_sblimp
from checkpoint import digest, newest
from configurator import configure
from foreign import read_array, read_json
from report import (
    accuracy,
    as_markdown,
    as_text,
    by_group,
    compare_results,
    item_path,
    nll_table,
    over_groups,
)

checkpoint = "out/train_tiny"    # folder of a run (its newest checkpoint is taken) or of a model
versus = ""                      # another one to compare with, or the evaluation.json of one
before = ""                      # SmolLM folder that the checkpoint started from: MMLU before speech training
tasks = []                       # which to score; []: those whose data you name, or else the demo's
blimp = ""                       # BLiMP's folder of .jsonl files
mmlu = ""                        # .csv or .csv.xz
sblimp = ""                      # ZeroSpeech's folder, with syntactic/ inside
tstorycloze = ""                 # folder of wavs or of wavs and texts, or a paired data set
sstorycloze = ""
librispeech = []                 # data sets with speech
text = []                        # data sets with text
cloze = "data/demo/cloze"        # Topic-Cloze set
val_text = ["data/demo/val"]     # data sets for the held-out NLL
val_speech = ["data/demo/val"]
val_interleaved = ["data/demo/val"]
val_sequences = 256              # sequences of each kind
text_span = [10, 30]             # words of a text span in interleaved sequences, least and most
speech_span = [5, 15]
seed = 1                         # of the choice of these sequences, of prefixes and of the bootstrap
sequence_length = 256
units = ""                       # folder of the speech units, for the tasks that have wavs
cache = "out/heard"              # units of benchmarks are kept here for the next checkpoint
batch_tokens = 0                 # positions scored at a time; 0: 512 on a CPU, where caches are small, else 16384
device = "auto"                  # "cuda", "cpu", "mps", or the best there is
dtype = "float32"                # or "bfloat16" (autocast)
out = ""                         # json file for the results; default: evaluation.json beside the checkpoint
protocol = dict(
    blimp=dict(score="sum", ties="share", bos=True),
    sblimp=dict(score="mean", ties="share", bos=True),
    tstorycloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    sstorycloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    topic_cloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    mmlu=dict(ties="share", bos=False))

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, str, list, dict)) and not k.startswith("_")}
CHOICES = dict(score=("sum", "mean"), span=("continuation", "whole"), ties=("share", "wrong", "first"))
CLOZE = protocol["topic_cloze"]
VALIDATION = 1 << 32  # the stage number under which held-out sequences are drawn
PREFIX = VALIDATION + 1  # and that of random prefixes
ROW_TOKENS = 512      # positions of a row into which sequences are packed, unless one alone is longer
SETTINGS = {"T": ("text", "text"), "S": ("speech", "speech"), "T->S": ("text", "speech"), "S->T": ("speech", "text")}


# ---------------------------------------------------------------------------------------------------------------------
# processes

class World(NamedTuple):
    """Where this process stands among all."""
    rank: int = 0
    local_rank: int = 0  # on its machine
    size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = World()


def join_world(device_name):
    """Join the processes that torchrun started, or be alone."""
    name = pick_device(device_name)
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    world = World(rank, local_rank, size, torch.device(name, local_rank) if name == "cuda" else torch.device(name))
    if name == "cuda":
        torch.cuda.set_device(world.device)
    if "RANK" in os.environ:
        # gloo adds up numbers that are on the CPU, so that no process waits for its GPU to count targets
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo",
                                device_id=world.device if name == "cuda" else None)
    return world


def share(value, world):
    """What the first process has, anything that json holds, on all of them."""
    if world.size == 1:
        return value
    text = json.dumps(value if world.rank == 0 else None).encode()
    size = int(all_sum([len(text) if world.rank == 0 else 0], world))
    letters = torch.frombuffer(bytearray(text.ljust(size)[:size]), dtype=torch.uint8).to(world.device)
    dist.broadcast(letters, 0)
    return json.loads(bytes(letters.tolist()))


def on_first(work, world):
    """What work() gives on the first process, on all; where it ends the script there, all end, and one says why."""
    try:
        found = [work() if world.rank == 0 else None, None]
    except SystemExit as end:
        found = [None, str(end)]
    value, reason = share(found, world)
    if reason is not None:
        raise SystemExit(reason if world.rank == 0 else 1)
    return value


def start_sum(values, world):
    """Begin to sum numbers over all processes: a function that waits for it and gives a float64 tensor on the CPU."""
    values = torch.as_tensor(values).cpu().double()
    work = dist.all_reduce(values, async_op=True) if world.size > 1 else None

    def finish():
        if work:
            work.wait()
        return values
    return finish


def all_sum(values, world):
    """Sum numbers over all processes -> float64 tensor on the CPU."""
    return start_sum(values, world)()


def pick_device(name):
    if name not in ("auto", "cuda", "cpu", "mps"):
        raise SystemExit(f"device={name}: choose auto, cuda, cpu or mps")
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise SystemExit(f"device={name}: torch {torch.__version__} sees none on this machine; choose auto or cpu")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# scoring

class Row(NamedTuple):
    """Sequences packed into one row: a forest of prefix trees (model.Tree) and what is scored in it."""
    ids: list
    parent: list
    end: list
    source: list   # of each target: the node that predicts it
    targets: list  # -1 where no span wants it
    paths: list    # (sequence, targets of its span) pairs


def pack(sequences, spans, chosen, row_tokens):
    """Rows of at most row_tokens nodes (more where one sequence alone has more) that hold the chosen sequences.

    In lexicographic order each sequence shares with the one before it the longest beginning that it shares with any,
    and appending what is new leaves the nodes of all trees in depth-first order. Equal sequences share all they have,
    so their scores are equal to the last bit.
    """
    rows, last, nodes, edges = [], [], [], []  # of the last sequence: its tokens, their nodes, targets 1.. predicted
    for i in sorted(chosen, key=lambda i: sequences[i][:spans[i][1]]):
        a, b = spans[i]
        tokens = sequences[i][:b]
        same = next((n for n, (x, y) in enumerate(zip(tokens, last)) if x != y), min(b, len(last)))
        keep = min(same, len(last) - 1, b - 1)  # nodes; the last token of a sequence is no node, only a target
        if not rows or (len(rows[-1].ids) + b - 1 - keep > row_tokens and b - 1 > keep):
            rows.append(Row([], [], [], [], [], []))
            same, keep, nodes, edges = 0, 0, [], []
        row = rows[-1]
        for node in nodes[keep:]:
            row.end[node] = len(row.ids)
        del nodes[keep:], edges[max(same - 1, 0):]
        for token in tokens[keep:b - 1]:
            row.parent.append(nodes[-1] if nodes else len(row.ids))
            nodes.append(len(row.ids))
            row.ids.append(token)
            row.end.append(0)
        for t in range(len(edges) + 1, b):
            edges.append(len(row.targets))
            row.source.append(nodes[t - 1])
            row.targets.append(-1)
        for t in range(a, b):
            row.targets[edges[t - 1]] = tokens[t]
        row.paths.append((i, np.array(edges[a - 1:])))
        last = tokens
    for row in rows:
        row.end[:] = [e or len(row.ids) for e in row.end]
    return rows


def token_log_likelihoods(model, sequences, spans, batch_tokens=16384, progress="", world=ALONE):
    """ln p of each token of a span given all before it: float64 [sum of the spans' lengths], 0 at switch tokens.

    Beginnings that sequences share are computed once. As `log_likelihood`, whose sums these are.
    """
    V, device = model.config.vocab_size, next(model.parameters()).device
    for i, (sequence, (a, b)) in enumerate(zip(sequences, spans)):
        if not 1 <= a < b <= len(sequence):
            raise ValueError(f"sequence {i}: nothing to score at tokens {a} to {b} of {len(sequence)}")
        if b - 1 > model.config.max_position_embeddings:
            raise ValueError(f"sequence {i}: {b - 1} positions, the model has {model.config.max_position_embeddings}")
    written = [max(s[:b]) < V for s, (_, b) in zip(sequences, spans)]
    at = np.cumsum([0, *(b - a for a, b in spans)])
    result, batches = np.zeros(at[-1]), []
    for text in (True, False):
        rows = pack(sequences, spans, [i for i, w in enumerate(written) if w == text], ROW_TOKENS)
        rows.sort(key=lambda row: -len(row.ids))
        while rows:
            n = max(1, batch_tokens // len(rows[0].ids))
            batches.append((text, rows[:n]))
            rows = rows[n:]
    bar = tqdm(total=len(sequences), desc=progress, leave=False, disable=None if progress and world.rank == 0 else True)
    for text, rows in batches[world.rank::world.size]:
        B, T, M = len(rows), len(rows[0].ids), max(len(row.targets) for row in rows)
        ids, parent, source = (np.zeros((B, n), np.int64) for n in (T, T, M))
        end, targets = np.tile(np.arange(1, T + 1), (B, 1)), np.full((B, M), -1)  # padding sees only itself
        for r, row in enumerate(rows):
            n, m = len(row.ids), len(row.targets)
            ids[r, :n], parent[r, :n], end[r, :n] = row.ids, row.parent, row.end
            source[r, :m], targets[r, :m] = row.source, row.targets
        ids, targets, *tree = (torch.from_numpy(x).to(device) for x in (ids, targets, parent, end, source))
        with torch.inference_mode():
            scored = model(ids, targets, B if text else 0, want=("logp",), tree=smoltolk.Tree(*tree))
        logp = scored.logp.cpu().double().numpy()
        for r, row in enumerate(rows):
            for i, path in row.paths:
                result[at[i]:at[i + 1]] = logp[r, path]
            bar.update(len(row.paths) * (world.size if bar.n + len(row.paths) * world.size <= bar.total else 1))
    bar.close()
    return all_sum(result, world).numpy()


def log_likelihood(model, sequences, spans, batch_tokens=16384, progress="", world=ALONE):
    """Log-likelihood of one span of each sequence given all before it.

    sequences   lists of ids in the model's id space
    spans       (a, b) per sequence, 1 <= a < b: tokens a..b-1 are scored, switch tokens aside
    progress    what stands before the bar; "": none
    world       the processes that share the work; each gets all results
    Returns (summed log-likelihoods in nats, numbers of scored tokens), float64 and int64 [n]. What else is in the batch
    has no effect. ValueError for an empty span or a sequence that is too long.
    """
    logp = token_log_likelihoods(model, sequences, spans, batch_tokens, progress, world)
    starts = np.cumsum([0, *(b - a for a, b in spans)])[:-1].astype(int)
    count = [sum(t != model.config.switch for t in s[a:b]) for s, (a, b) in zip(sequences, spans)]
    return (np.add.reduceat(logp, starts) if spans else np.zeros(0)), np.array(count, np.int64)


def right_by(total, count, protocol):
    """{"sum", "mean": float64 [n]}, is the first candidate best by summed and by mean log-likelihood? [n * candidates]

    The measure that the protocol says comes first.
    """
    k = 2
    scores = {"sum": total.reshape(-1, k), "mean": (total / np.maximum(count, 1)).reshape(-1, k)}
    return {name: best_is(scores[name], 0, protocol["ties"]) for name in sorted(scores, key=protocol["score"].__ne__)}


def best_is(scores, answer, ties="share"):
    """float64 [n]: 1 where candidate `answer` has the highest score, 0 where another has it. scores [n, candidates]."""
    answer = np.broadcast_to(answer, len(scores))[:, None]
    best = scores == scores.max(1, keepdims=True)
    if ties == "first":
        return (best.argmax(1) == answer[:, 0]).astype(float)
    mine, k = np.take_along_axis(best, answer, 1)[:, 0], best.sum(1)
    return mine / k if ties == "share" else (mine & (k == 1)).astype(float)


# ---------------------------------------------------------------------------------------------------------------------
# stories: context and endings

def cloze_sequence(context, continuation, modalities, config, bos=True, whole=False, prefix=()):
    """(ids, span that is scored): EOS, context, a switch token if the modality changes, continuation.

    prefix: text ids before a spoken context. Without context and continuation apart: context [], or whole=True.
    """
    eos = config.eos_token_id if len(prefix) or modalities[0] == "text" else config.speech_eos
    ids = [eos] * bos + ([*prefix, config.switch] if len(prefix) else []) + [*context]
    ids += [config.switch] * (len(context) > 0 and modalities[0] != modalities[1])
    return [*ids, *continuation], (1 if whole else max(1, len(ids)), len(ids) + len(continuation))


def cloze_scores(model, stories, setting, protocol=CLOZE, seed=1, batch_tokens=16384, progress="", world=ALONE):
    """(summed log-likelihoods, numbers of scored tokens) of each story's two endings, [2 * stories].

    stories: (context, right ending, wrong ending), each {"text": ids, "speech": units in the model's id space}
    """
    (before, after), V, scored = SETTINGS[setting], model.config.vocab_size, []
    for i, (context, *endings) in enumerate(stories):
        n = protocol["prefix"] if setting == "S->T" else 0
        prefix = (data.uniform(seed, PREFIX, i, np.arange(n)) * V).astype(np.int64).tolist()
        scored += [cloze_sequence(context[before], ending[after], (before, after), model.config, protocol["bos"],
                                  protocol["span"] == "whole", prefix) for ending in endings]
    return log_likelihood(model, [s for s, _ in scored], [span for _, span in scored], batch_tokens, progress, world)


def paired_stories(cloze_set, config, items=None):
    """Stories of a paired set whose documents come in threes: opening, true ending, another story's ending.

    items: which ones (indices), None: all
    """
    n = cloze_set.meta["documents"]
    if n % 3:
        raise data.DataError(f"{cloze_set.folder}: {n} documents; a cloze set has them in threes")
    def part(i):
        text, units, _, _ = cloze_set.document(i)
        return {"text": text[:-1].tolist(), "speech": (units[:-1] + config.vocab_size).tolist()}  # EOS stripped
    return [[part(3 * item + j) for j in range(3)] for item in (range(n // 3) if items is None else items)]


def topic_cloze(model, cloze_set, batch_tokens=16384, items=None, stop=()):
    """{setting: float64 [items], 1 where the true ending scores higher, 0 where the other one does, 1/2 for a tie}.

    stop: once there is something in it the rest is left out
    """
    stories, right = paired_stories(cloze_set, model.config, items), {}
    for name in SETTINGS:
        if stop:
            break
        right[name] = right_by(*cloze_scores(model, stories, name, batch_tokens=batch_tokens), CLOZE)["mean"]
    return right


def read_stories(e, folder):
    """({setting: stories}, are they whole?) of a folder of wavs and texts, for cloze_scores."""
    whole, cross = find_stories(folder)
    if whole:
        heard = [{"speech": ids} for ids in e.hear([path for pair in whole for path in pair])]
        return {"S": [({"speech": []}, *pair) for pair in zip(heard[::2], heard[1::2])]}, True
    stories = [[{} for _ in range(3)] for _ in next(iter(cross.values()))]
    for modality, files in cross.items():
        flat = [path for story in files for path in story]
        if modality == "speech":
            ids = e.hear(flat)
        else:  # an ending carries the space that follows the context
            ids = [e.tokenizer.encode(" " * (i % 3 > 0) + read_line(path)) for i, path in enumerate(flat)]
            e.used += flat
        for i, part in enumerate(ids):
            stories[i // 3][i % 3][modality] = part
    return {name: stories for name, modalities in SETTINGS.items() if cross.keys() >= {*modalities}}, False


def score_stories(e, task):
    """sstorycloze, tstorycloze, topic_cloze: {setting: accuracy}, and the answers."""
    folder, protocol = Path(getattr(e.c, "cloze" if task == "topic_cloze" else task)), dict(e.c.protocol[task])
    if (folder / "meta.json").exists() or task == "topic_cloze":
        stories = paired_stories(data.open_set(folder, *e.made_with), e.model.config)
        stories, whole = dict.fromkeys(SETTINGS, stories), False
        e.used += sorted([folder / "meta.json", *folder.glob("*.npy")])
    else:
        stories, whole = read_stories(e, folder)
        if whole:
            protocol["span"] = e.notes["span"] = "whole"
    result, items = {}, {}
    for setting in stories if e.has_speech else stories.keys() & {"T"}:
        total, count = cloze_scores(e.model, stories[setting], setting, protocol, e.c.seed, e.c.batch_tokens,
                                    f"{task} {setting}", e.world)
        right = right_by(total, count, protocol)
        first, other = right
        result[setting] = accuracy(right[first])
        e.notes[f"{setting} by {other}"] = accuracy(right[other])["accuracy"]
        items |= {f"{setting}.right": right[first], f"{setting}.total": total, f"{setting}.tokens": count}
    if not result:
        raise ValueError(f"{folder}: nothing here that a text model can score")
    return result, items


# ---------------------------------------------------------------------------------------------------------------------
# sound

def hear_files(e, files):
    """Units of sound files in the model's id space, a list of ids each. ValueError for one that cannot be used.

    They are kept under e.c.cache, keyed by the hashes of the units and of all files, and shared out among processes.
    """
    e.used += files
    digests = {file: digest(file) for file in set(files)}
    files, wanted = sorted(digests, key=digests.get), files  # wherever they lie, in this order
    key = f"{fingerprint(files)['sha256'][:16]}-{str(e.made_with[1])[:16]}"
    paths = [Path(e.c.cache) / f"{key}.{name}.npy" for name in ("ids", "offsets")]
    if all_sum([float(all(path.exists() for path in paths))], e.world) < e.world.size:
        if not e.c.units:
            raise ValueError("units: the folder of speech units is needed for wavs; set --units=FOLDER")
        vocabulary = speech.load_units(e.c.units, str(e.world.device))
        if vocabulary.hash != e.made_with[1]:
            raise ValueError(f"{e.c.units}: units {vocabulary.hash}, the model has {e.made_with[1]}")
        heard, mine = {}, range(e.world.rank, len(files), e.world.size)
        for chunk in tqdm(range(0, len(mine), 32), "hearing", leave=False, disable=None if e.world.rank == 0 else True):
            waves = [speech.read_audio(files[i]) for i in mine[chunk:chunk + 32]]
            with torch.autocast(e.world.device.type, enabled=False):  # units are made in fp32, as in the data
                heard |= zip(mine[chunk:chunk + 32], (ids for ids, _ in speech.units(waves, vocabulary)))
        size = np.zeros(len(files))
        size[list(heard)] = [len(ids) for ids in heard.values()]
        offsets = np.cumsum([0, *all_sum(size, e.world).tolist()]).astype(np.int64)
        flat = np.zeros(offsets[-1])
        for i, ids in heard.items():
            flat[offsets[i]:offsets[i + 1]] = ids
        flat = all_sum(flat, e.world).numpy().astype(np.uint16)
        if e.world.rank == 0:
            Path(e.c.cache).mkdir(parents=True, exist_ok=True)
            for path, array in zip(paths, (flat, offsets)):
                writing = path.with_suffix(f".{os.getpid()}.npy")  # another process may be writing the same
                np.save(writing, array)
                os.replace(writing, path)
    else:
        flat, offsets = (np.array(read_array(path)) for path in paths)
        if (flat.dtype, offsets.shape) != (np.uint16, (len(files) + 1,)) or (np.diff(offsets) < 0).any() or (
                (offsets[0], offsets[-1]) != (0, len(flat)) or flat.max(initial=0) >= e.model.config.n_units):
            raise ValueError(f"{paths[0]}: not the units of these files; remove it, they will be made again")
    for file, n in zip(files, np.diff(offsets)):
        if n == 0:
            raise ValueError(f"{file}: too short for a single unit")
    ids = (flat.astype(np.int64) + e.model.config.vocab_size).tolist()
    by_file = {file: ids[a:b] for file, a, b in zip(files, offsets, offsets[1:])}
    return [by_file[file] for file in wanted]


def sblimp_table(rows, scores, ties="share"):
    """rows of gold.csv, scores {filename: score} -> (result, right answers float64 [pairs], averaged over voices)."""
    voices = {}
    for row in rows:
        key = (row["type"], row["subtype"], row["id"])
        voices.setdefault(key, {}).setdefault(row["voice"], [0, 0])[1 - int(row["correct"])] = scores[row["filename"]]
    keys, pairs = list(voices), [(k, v, s) for k, by in voices.items() for v, s in by.items()]
    each = best_is(np.array([s for _, _, s in pairs]), 0, ties)
    at = {key: [] for key in keys}
    for (key, _, _), value in zip(pairs, each):
        at[key].append(value)
    right = np.array([np.mean(at[key]) for key in keys])
    by_type = by_group(right, [key[0] for key in keys])
    by_type_mean = float(np.mean([r["accuracy"] for r in by_type.values()]))
    by_voice = by_group(each, [voice for _, voice, _ in pairs])
    return dict(accuracy(right), by_type_mean=by_type_mean, by_type=by_type, by_voice=by_voice), right


def score_sblimp(e, task):
    """sBLIMP: results of dev (and of test where it has a gold.csv), submission files of both."""
    result, items, protocol = {}, {}, e.c.protocol[task]
    folders = [Path(e.c.sblimp) / "syntactic" / split for split in ("dev", "test")]
    for folder in (f for f in folders if f.is_dir()):
        wavs, rows = sorted(folder.glob("*.wav")), None
        if (folder / "gold.csv").exists():
            rows = read_sblimp(folder / "gold.csv")
            names = {path.stem for path in wavs}
            for row in rows:
                if row["filename"] not in names:
                    raise ValueError(f"{folder / row['filename']}.wav: missing, though gold.csv names it")
            e.used.append(folder / "gold.csv")
        sequences = [cloze_sequence([], ids, ("speech", "speech"), e.model.config, protocol["bos"])
                     for ids in e.hear(wavs)]
        total, count = log_likelihood(e.model, [s for s, _ in sequences], [span for _, span in sequences],
                                      e.c.batch_tokens, f"sblimp {folder.name}", e.world)
        scores = {"sum": total, "mean": total / np.maximum(count, 1)}
        if e.world.rank == 0:
            lines = (f"{path.stem} {score!r}\n" for path, score in zip(wavs, scores[protocol["score"]].tolist()))
            e.path.with_name(f"{e.path.stem}.sblimp.{folder.name}.txt").write_text("".join(lines))
        items |= {f"{folder.name}.total": total, f"{folder.name}.tokens": count}
        if rows:
            for name in sorted(scores, key=protocol["score"].__ne__):
                by_file = dict(zip((path.stem for path in wavs), scores[name]))
                table, right = sblimp_table(rows, by_file, protocol["ties"])
                if name == protocol["score"]:
                    result[folder.name], items[f"{folder.name}.right"] = table, right
                else:
                    result[folder.name][f"by_{name}"] = table["accuracy"]
    if not result and not items:
        raise ValueError(f"{e.c.sblimp}: no syntactic/dev or syntactic/test inside")
    return result, items


# ---------------------------------------------------------------------------------------------------------------------
# text benchmarks

def score_blimp(e, task):
    """Text BLiMP: accuracy over all pairs, by field, by phenomenon, by paradigm."""
    items, protocol = read_blimp(e.c.blimp), e.c.protocol[task]
    e.used += sorted(Path(e.c.blimp).glob("*.jsonl"))
    start = [e.tokenizer.eos] * protocol["bos"]
    sequences = [start + e.tokenizer.encode(item[key]) for item in items for key in ("good", "bad")]
    total, count = log_likelihood(e.model, sequences, [(1, len(s)) for s in sequences], e.c.batch_tokens, task, e.world)
    right = right_by(total, count, protocol)
    first, other = right
    result = dict(accuracy(right[first]), **{f"by_{other}": accuracy(right[other])["accuracy"]})
    for key in ("field", "phenomenon", "paradigm"):
        result[f"by_{key}"] = by_group(right[first], [item[key] for item in items])
    return result, dict(right=right[first], total=total, tokens=count)


def score_mmlu(e, task):
    """MMLU in the cloze form: {acc, acc_norm: mean over subjects; each by subject}."""
    items, bos, ties = read_mmlu(e.c.mmlu), e.c.protocol[task]["bos"], e.c.protocol[task]["ties"]
    e.used.append(Path(e.c.mmlu))
    sequences, spans, cut = [], [], 0
    for item in items:
        question = (f"The following are questions about {item['subject'].replace('_', ' ')}.\nQuestion: "
                    f"{item['question']}\nAnswer:")
        context = [e.tokenizer.eos] * bos + e.tokenizer.encode(question)
        choices = [e.tokenizer.encode(" " + choice) for choice in item["choices"]]
        room = e.model.config.max_position_embeddings + 1 - max(map(len, choices))
        cut += len(context) > room
        context = context[-room:]  # a question that is too long loses its beginning, for all its choices
        sequences += [context + choice for choice in choices]
        spans += [(len(context), len(context) + len(choice)) for choice in choices]
    total, count = log_likelihood(e.model, sequences, spans, e.c.batch_tokens, task, e.world)
    total, answer = total.reshape(-1, 4), np.array([item["answer"] for item in items])
    characters = np.array([[len(choice) for choice in item["choices"]] for item in items])
    right = {"acc_norm": best_is(total / characters, answer, ties), "acc": best_is(total, answer, ties)}
    subjects, result = [item["subject"] for item in items], dict(cut_questions=cut)
    for name, answers in right.items():
        result[name], result[f"{name}_by_subject"] = over_groups(answers, subjects), by_group(answers, subjects)
    return result, {f"{name}.right": r for name, r in right.items()} | dict(total=total, tokens=count)


# ---------------------------------------------------------------------------------------------------------------------
# negative log-likelihood of documents

def windows(n, limit):
    """[(start, first scored, end)] that score tokens 1..n-1 once, in windows of at most limit inputs."""
    spans, done = [], 1
    while done < n:
        end = min(n, limit + 1 if done == 1 else done + max(1, limit // 2))
        spans.append((max(0, end - limit - 1), done, end))
        done = end
    return spans


def score_documents(e, task):
    """librispeech, text: {nll, stderr (over documents, in nats per token), tokens, documents, perplexity}."""
    stream, sequences, spans, owner, offset = dict(librispeech="speech", text="text")[task], [], [], [], 0
    eos, shift = ((e.model.config.speech_eos, e.model.config.vocab_size) if stream == "speech" else
                  (e.model.config.eos_token_id, 0))
    for shard in data.open_source(stream, getattr(e.c, task), *e.made_with).shards:
        tokens, paired = getattr(shard, stream), shard.meta["kind"] == "paired"
        bounds = getattr(shard, f"{stream}_words")[shard.documents] if paired else shard.documents
        for i, (a, b) in enumerate(zip(bounds, bounds[1:])):
            ids = [eos, *(tokens[a:b - 1].astype(np.int64) + shift).tolist()]
            for start, first, end in windows(len(ids), e.model.config.max_position_embeddings):
                sequences.append(ids[start:end])
                spans.append((first - start, end - start))
                owner.append(offset + i)
        offset += len(bounds) - 1
        e.used.append(shard.folder / f"{stream}.npy")
    total, count = log_likelihood(e.model, sequences, spans, e.c.batch_tokens, task, e.world)
    nll, tokens = (np.bincount(owner, x, offset) for x in (-total, count))
    mean = nll.sum() / tokens.sum()
    spread = np.sqrt(((nll - mean * tokens) ** 2).sum()) / tokens.sum()
    return (dict(nll=mean, stderr=spread, tokens=int(tokens.sum()), documents=offset, perplexity=float(np.exp(mean))),
            dict(nll=nll, tokens=tokens))


def heldout_nll(model, sources, seed, n_sequences, length, spans=((10, 30), (5, 15)), batch_tokens=16384, rank=0,
                world_size=1, stop=()):
    """{kind: summed (text nll, speech nll, text targets, speech targets)} over n_sequences held-out sequences each.

    spans: least and most words of a text and of a speech span in interleaved sequences. Sequences are shared among
    ranks, so the sums of all ranks, float64 [4] each, add up to the same total. stop: as for topic_cloze
    """
    device, sums = next(model.parameters()).device, {}
    for kind, source in sources.items():
        sums[kind] = np.zeros(4)
        mine = np.arange(rank, n_sequences, world_size)
        for part in np.array_split(mine, max(1, -(-len(mine) * length // batch_tokens))):
            if len(part) == 0 or stop:
                continue
            rows, text_rows = data.sample({kind: source}, {kind: 1}, seed, VALIDATION, part, length + 1, model.config,
                                          *spans)
            tokens = torch.from_numpy(rows).to(device)
            with torch.inference_mode():
                out = model(tokens[:, :-1], tokens[:, 1:], text_rows)
            sums[kind] += [float(out.text_nll), float(out.speech_nll), out.n_text, out.n_speech]
    return sums


def score_windows(e, task):
    """nll: {kind: {modality: nats}} of random windows."""
    c = e.c
    sources = {kind: data.open_source(kind, getattr(c, f"val_{kind}"), *e.made_with, c.sequence_length + 1)
               for kind in ("text", "speech", "interleaved") if getattr(c, f"val_{kind}")}
    sums = heldout_nll(e.model, sources, c.seed, c.val_sequences, c.sequence_length, (c.text_span, c.speech_span),
                       c.batch_tokens, e.world.rank, e.world.size)
    e.used += sorted({shard.folder / "meta.json" for source in sources.values() for shard in source.shards})
    return nll_table({kind: all_sum(s, e.world).numpy() for kind, s in sums.items()}), {}


TASKS = dict(blimp=score_blimp, sblimp=score_sblimp, tstorycloze=score_stories, sstorycloze=score_stories,
             topic_cloze=score_stories, mmlu=score_mmlu, librispeech=score_documents, text=score_documents,
             nll=score_windows)
SPEECH = ("sblimp", "librispeech", "nll")  # a plain SmolLM cannot do these


def newest_checkpoint(folder):
    """The newest good checkpoint of a run, or the folder itself if it holds a model."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return folder
    found, bad = newest(folder, skip=("optimizer.safetensors",))
    if found is None:
        raise SystemExit(f"{folder}: no {'good ' if bad else ''}checkpoint here; give --checkpoint=FOLDER of a run or"
                         f" of a model")
    return found


def made_with(folder):
    """(hash of the tokenizer, hash of the units) that a checkpoint was trained with; None where it does not say."""
    tokenizer, units = folder / "tokenizer.json", folder / "units.json"
    return (data.Tokenizer(tokenizer).hash if tokenizer.exists() else None,
            read_json(units).get("hash") if units.exists() else None)


# ---------------------------------------------------------------------------------------------------------------------

def choose_tasks(c, has_speech):
    """Names of the tasks to score: c.tasks, else those whose data was named, else the demo's. ValueError, see below."""
    keys = {name: [{"topic_cloze": "cloze"}.get(name, name)] for name in TASKS}
    keys["nll"] = ["val_text", "val_speech", "val_interleaved"]
    named = [name for name in TASKS if any(getattr(c, key) != DEFAULTS[key] for key in keys[name])]
    names = c.tasks or named or ["topic_cloze", "nll"]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"tasks: no task {name}; choose among {', '.join(TASKS)}")
        if not has_speech and name in SPEECH:
            raise ValueError(f"tasks: {name} needs speech, and this checkpoint has no speech.safetensors")
        places = [getattr(c, key) for key in keys[name] if getattr(c, key)]
        if not places:
            raise ValueError(f"tasks: {name} has no data; set --{keys[name][0]}")
        for place in sum(([p] if isinstance(p, str) else list(p) for p in places), []):
            if not Path(place).exists():
                raise ValueError(f"{place}: no such file or folder; {name} is to be scored on it")
    for task, options in c.protocol.items():
        for key, value in options.items():
            if value not in CHOICES.get(key, (value,)):
                raise ValueError(f"protocol.{task}.{key}={value}: choose {' or '.join(CHOICES[key])}")
    return names


def evaluate(folder, c, world, path):
    """Score a checkpoint -> results, also written to path (json), its .md and, by item, its .items. ValueError."""
    folder = Path(folder)
    has_speech = (folder / "speech.safetensors").exists()
    names = choose_tasks(c, has_speech)
    model = smoltolk.from_pretrained(folder).to(world.device).eval()
    e = SimpleNamespace(model=model, c=c, world=world, path=path, has_speech=has_speech, made_with=made_with(folder),
                        tokenizer=data.Tokenizer(folder / "tokenizer.json"))
    e.hear = lambda files: hear_files(e, list(files))
    train = read_json(folder / "train.json") if (folder / "train.json").exists() else {}
    sizes = smoltolk.count_parameters(model)
    results = dict(checkpoint=str(folder), sha256={f.name: digest(f) for f in sorted(folder.glob("*.safetensors"))
                                                  if f.stem != "optimizer"},
                   parameters=sum(sizes) if has_speech else sizes[0], tokens=train.get("place", {}).get("tokens"),
                   settings=vars(c), processes=world.size, device=world.device.type, torch=torch.__version__, made={})
    half = c.dtype == "bfloat16"
    for name in names:
        began, e.used, e.notes = time.perf_counter(), [], {}
        with torch.autocast(world.device.type, torch.bfloat16) if half else nullcontext():
            result, items = TASKS[name](e, name)
        results[name] = result
        results["made"][name] = dict(protocol=c.protocol.get(name, {}), files=fingerprint(e.used), items=list(items),
                                     notes=e.notes, seconds=time.perf_counter() - began)
        if world.rank == 0:
            path.with_suffix(".items").mkdir(exist_ok=True)
            for key, array in items.items():
                np.save(item_path(path, name, key), array)
            write(results, path)
    return results


def write(results, path):
    path.write_text(json.dumps(results, indent=1))
    path.with_suffix(".md").write_text(as_markdown(results))


def check_spans(c):
    """SystemExit if the lengths of spans in interleaved sequences make no sense."""
    for key in ("text_span", "speech_span"):
        span = getattr(c, key)
        if [type(n) for n in span] != [int, int] or not 1 <= span[0] <= span[1]:
            raise SystemExit(f"{key}={span}: give the least and the most words of a span, like [5, 15]")


def check_settings(c):
    """SystemExit, before anything is scored, for what could not be used after it."""
    check_spans(c)
    if c.dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"dtype={c.dtype}: choose float32 or bfloat16")
    if min(c.batch_tokens, *(options.get("prefix", 0) for options in c.protocol.values())) < 0 or c.val_sequences < 1:
        raise SystemExit("batch_tokens, protocol.TASK.prefix: give 0 or more; val_sequences: 1 or more")
    path = Path(c.out or Path(c.checkpoint) / "evaluation.json")
    if not path.parent.is_dir() or path.is_dir() or path.suffix != ".json":
        raise SystemExit(f"out={path}: give the name of a .json file in a folder that is there")
    if c.versus.endswith(".json") and not Path(c.versus).is_file():
        raise SystemExit(f"versus={c.versus}: no such file")
    wanted = made_with(Path(c.checkpoint))[1]
    if c.units and wanted not in (None, speech.read_vocabulary(c.units)[0]["hash"]):
        raise SystemExit(f"{c.units}: not the units that {c.checkpoint} was trained with ({wanted})")
    if c.before and not c.mmlu:
        raise SystemExit(f"before={c.before}: is scored on MMLU alone; set --mmlu too")
    return path


def main(argv):
    settings, _ = configure(DEFAULTS, argv)
    c, world = SimpleNamespace(**settings), join_world(settings["device"])
    c.batch_tokens = c.batch_tokens or (512 if world.device.type == "cpu" else 16384)
    c.protocol = {task: options | c.protocol.get(task, {}) for task, options in DEFAULTS["protocol"].items()}
    for key in ("checkpoint", "before", "versus"):  # of a run that is still writing them too, the same for all
        if (folder := getattr(c, key)) and not folder.endswith(".json"):
            setattr(c, key, on_first(lambda folder=folder: str(newest_checkpoint(folder)), world))
    try:
        path = check_settings(c)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    try:
        results = evaluate(c.checkpoint, c, world, path)
        if c.before and "mmlu" in results:
            other = SimpleNamespace(**vars(c) | dict(tasks=["mmlu"]))
            results["before"] = evaluate(c.before, other, world, path.with_name(f"{path.stem}.before.json"))["mmlu"]
        if c.versus:
            second = Path(c.versus)
            if second.suffix != ".json":
                second = path.with_name(f"{path.stem}.versus.json")
                evaluate(c.versus, c, world, second)
            if world.rank == 0:
                results["versus"] = dict(checkpoint=c.versus, scores=compare_results(path, second))
    except ValueError as error:  # says which file and what
        raise SystemExit(str(error)) from None
    if world.rank == 0:
        write(results, path)
        print(as_text(results))
        print(f"written to {path}, {path.with_suffix('.md')}, {path.with_suffix('.items')}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
