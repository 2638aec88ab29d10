"""
Score a checkpoint, or a plain SmolLM folder (text only), on the benchmarks of the paper or on the demo's held-out data.

    python evaluate.py --checkpoint=out/train_tiny                               held-out NLL and Topic-Cloze
    python evaluate.py --checkpoint=weights/smollm-135m --tasks='["blimp","mmlu"]' --blimp=blimp/data --mmlu=mmlu.csv
    torchrun --nproc_per_node=4 evaluate.py --checkpoint=out/train_150m --before=weights/smollm-135m --mmlu=mmlu.csv \\
        --units=units/mhubert --sblimp=zerospeech2021 --tstorycloze=tSC --sstorycloze=sSC \\
        --librispeech='["data/librispeech-dev"]'
    python evaluate.py --checkpoint=A --versus=B       score both, and test whether their scores differ

The tasks are topic_cloze and nll (the scores of a training run), blimp, mmlu, sblimp, tstorycloze, sstorycloze,
librispeech and text. benchmarks/__init__.py describes the files and the protocol of each task. An option such as
--protocol.blimp.score=mean changes a protocol. Every result is written with its protocol.
"""
import json
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import hear, report, storycloze
from benchmarks.blimp import score as score_blimp
from benchmarks.librispeech import score as score_documents
from benchmarks.mmlu import score as score_mmlu
from benchmarks.sblimp import score as score_sblimp
from configurator import configure
from data import open_source, sample
from model import SmolTolk, count_parameters, from_pretrained, make_layout, nll
from runtime.checkpoint import demo_of, made_with, newest
from runtime.distributed import ALONE, World, all_sum, join_world, leave_world, on_first
from runtime.files import digest, find_files, read_json
from runtime.hub import local_folder
from runtime.packing import pack_weights
from runtime.threads import share_cores
from runtime.tokenizer import Tokenizer

checkpoint = "assets/tiny/smoltolk"  # folder of a run (its newest checkpoint is scored) or of a model
versus = ""                      # a second checkpoint to compare with, or its evaluation.json
before = ""                      # SmolLM folder from which training started; it is scored on MMLU
tasks = []                       # the tasks to score; []: those whose data is set, otherwise topic_cloze and nll
blimp = ""                       # BLiMP's folder of .jsonl files
mmlu = ""                        # .csv or .csv.xz file
sblimp = ""                      # ZeroSpeech's folder, with syntactic/ inside
tstorycloze = ""                 # folder of wavs, or of wavs and texts, or a paired data set
sstorycloze = ""                 # the same for StoryCloze
librispeech = []                 # data sets with speech
text = []                        # data sets with text
cloze = ""                       # Topic-Cloze set; "": the demo's
val_text = []                    # data sets for the held-out NLL of text; if all three are []: the demo's
val_speech = []                  # data sets for the held-out NLL of speech
val_interleaved = []             # data sets for the held-out NLL of interleaved sequences
val_sequences = 256              # held-out sequences of each kind
text_span = [10, 30]             # fewest and most words of a text span in interleaved sequences
speech_span = [5, 15]            # fewest and most words of a speech span
seed = 1                         # for held-out sequences and prefixes
sequence_length = 256            # tokens of a held-out sequence
units = ""                       # folder of the speech units, for tasks with wavs
cache = "out/heard"              # folder in which the units of wavs are kept for the next checkpoint
batch_tokens = 0                 # positions in one forward pass; 0: 512 on a CPU, where caches are small, else 16384
device = "auto"                  # "cuda", "cpu", "mps", or "auto" for the best one available
dtype = "float32"                # or "bfloat16" (autocast)
out = ""                         # json file for the results; default: evaluation.json in the checkpoint's folder
protocol = dict(                 # how each task is scored; see benchmarks/__init__.py
    blimp=dict(score="sum", ties="share", bos=True),
    sblimp=dict(score="mean", ties="share", bos=True),
    tstorycloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    sstorycloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    topic_cloze=dict(score="mean", span="continuation", ties="share", bos=True, prefix=0),
    mmlu=dict(ties="share", bos=False))

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, str, list, dict)) and not k.startswith("_")}
CHOICES = dict(score=("sum", "mean"), span=("continuation", "whole"), ties=("share", "wrong", "first"))
ROW = 160  # positions of a row: a longer one shares more beginnings, but attention grows with the square of its length
VALIDATION = 1 << 32  # stage number for drawing held-out sequences; no training stage has this number


# ---------------------------------------------------------------------------------------------------------------------
# scoring

class Row(NamedTuple):
    """Sequences as a tree: a beginning that some of them share is read once."""
    ids: list          # the inputs, each branch of the tree after the one before it
    subtree_end: list  # the last position below each position; see SmolTolk.read
    scored: list       # (number of a sequence, the positions that predict its scored tokens)


def make_rows(sequences, spans, numbers):
    """The Rows of the sequences with these numbers. spans: (a, b) of each sequence, the tokens to score.

    Example: 0 5 6 7, 0 5 8 9 and 0 8 2 become the ids 0 5 6 8 8 with subtree_end 4 3 2 3 4. The last token of each is
    only predicted. Beginnings can be shared because no position depends on later ones.
    """
    inputs = {number: list(sequences[number][:spans[number][1] - 1]) for number in numbers}
    rows, path = [], []  # path: the positions of the sequence that was placed last
    for number in sorted(numbers, key=inputs.get):  # neighbours share the longest beginnings
        new = inputs[number]
        shared = common_length(new, [rows[-1].ids[position] for position in path])
        if not rows or len(rows[-1].ids) + len(new) - shared > ROW + 2 * shared:  # long rows only for long beginnings
            rows.append(Row([], [], []))
            shared = 0
        row = rows[-1]
        path = [*path[:shared], *range(len(row.ids), len(row.ids) + len(new) - shared)]
        row.ids.extend(new[shared:])
        row.subtree_end.extend(path[shared:])
        for position in path:
            row.subtree_end[position] = len(row.ids) - 1
        row.scored.append((number, path[spans[number][0] - 1:]))
    return rows


def common_length(a, b):
    """How many elements two lists have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_batches(rows, batch_tokens):
    """Group rows of similar length into batches of at most batch_tokens positions, the longest rows first."""
    rows, batches = sorted(rows, key=lambda row: -len(row.ids)), []
    while rows:
        longest = len(rows[0].ids)
        similar = [row for row in rows[:max(1, batch_tokens // longest)] if len(row.ids) >= 0.9 * longest]
        batches.append(similar)
        rows = rows[len(similar):]
    return batches


def score_batch(model, rows, sequences, spans, speaks):
    """{number: summed log-likelihood in nats} of the sequences in some rows. speaks: see SmolTolk.read."""
    T, V, device = len(rows[0].ids), model.config.vocab_size, next(model.parameters()).device
    ids, subtree_end = torch.zeros(len(rows), T, dtype=torch.long), torch.arange(T).repeat(len(rows), 1)
    predicted, logp = {}, {}  # {number: [(flat position, next token), ..]}, and the log-likelihood of each such pair
    for r, row in enumerate(rows):
        n = len(row.ids)
        ids[r, :n], subtree_end[r, :n] = torch.tensor(row.ids), torch.tensor(row.subtree_end)
        for number, positions in row.scored:
            tokens = sequences[number][slice(*spans[number])]
            predicted[number] = [(r * T + position, token) for position, token in zip(positions, tokens)]
            logp |= dict.fromkeys(predicted[number], 0.0)  # 0 stays only for switch tokens
    with torch.inference_mode():
        out = model.read(ids.to(device), subtree_end=subtree_end.to(device), speaks=speaks)
        heads = ((out.text, model.text_logits, 0, V), (out.speech, model.speech_logits, V, model.config.n_units + 1))
        for x, head, first, n_symbols in heads:
            pairs = [(position, token) for position, token in logp if first <= token < first + n_symbols]
            if pairs:
                positions, tokens = torch.tensor(pairs, device=device).T
                losses = nll(x.flatten(0, 1)[positions], head, n_symbols, tokens - first)
                logp.update(zip(pairs, (-losses).tolist()))
    return {number: sum(logp[pair] for pair in pairs) for number, pairs in predicted.items()}


def log_likelihood(model, sequences, spans, batch_tokens=16384, progress="", world=ALONE):
    """Log-likelihood of one span of each sequence, given all tokens before it.

    sequences   lists of ids in the model's id space
    spans       (a, b) per sequence, 1 <= a < b: tokens a..b-1 are scored, except switch tokens
    progress    title of the progress bar; "": no bar
    world       the processes that share the work; each of them gets all results
    Returns (summed log-likelihoods in nats, numbers of scored tokens), float64 and int64 [n]. They do not depend on the
    other sequences, and equal sequences score exactly equal. ValueError for an empty span or a sequence that is too
    long.
    """
    config = model.config
    for i, (sequence, (a, b)) in enumerate(zip(sequences, spans)):
        if not 1 <= a < b <= len(sequence):
            raise ValueError(f"sequence {i}: nothing to score at tokens {a} to {b} of {len(sequence)}")
        if b - 1 > config.max_position_embeddings:
            raise ValueError(f"sequence {i}: {b - 1} positions, the model has {config.max_position_embeddings}")
    numbers = {False: [], True: []}  # {speaks: numbers}, because sequences of text alone need no speech modules
    for number, (sequence, (_, b)) in enumerate(zip(sequences, spans)):
        numbers[max(sequence[:b]) >= config.vocab_size].append(number)
    batches = [(batch, speaks) for speaks in numbers
               for batch in make_batches(make_rows(sequences, spans, numbers[speaks]), batch_tokens)]
    total = np.zeros(len(sequences))
    hide_bar = world.rank > 0 or not progress or None  # None: hidden unless this is a terminal
    for rows, speaks in tqdm(batches[world.rank::world.size], progress, leave=False, disable=hide_bar):
        for number, value in score_batch(model, rows, sequences, spans, speaks).items():
            total[number] = value
    count = [sum(token != config.switch for token in sequence[a:b]) for sequence, (a, b) in zip(sequences, spans)]
    return all_sum(total, world).numpy(), np.array(count, np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# the held-out scores of a training run

def topic_cloze(model, cloze_set, batch_tokens=16384, items=None, stop=()):
    """{setting: float64 [items]}: 1 if the true ending has the higher score, 0 if the wrong one has, 1/2 for a tie.

    items   the indices of the stories to score; None: all
    stop    a list; as soon as it is not empty, the remaining settings are skipped
    """
    stories, right = storycloze.paired_stories(cloze_set, model.config, items), {}
    for setting in report.SETTINGS:
        if stop:
            break
        protocol = DEFAULTS["protocol"]["topic_cloze"]
        sequences, spans = storycloze.story_sequences(stories, setting, protocol, model.config)
        total, count = log_likelihood(model, sequences, spans, batch_tokens)
        right[setting] = report.right_by(total, count)["mean"]
    return right


def heldout_nll(model, sources, seed, n_sequences, length, spans=((10, 30), (5, 15)), batch_tokens=16384, rank=0,
                world_size=1, stop=()):
    """{kind: sums [text NLL, speech NLL, text targets, speech targets], float64} over held-out sequences.

    sources       {kind: Source}
    n_sequences   of each kind
    spans         fewest and most words of a text span and of a speech span in interleaved sequences
    rank          this process scores a share of the sequences; the caller adds up the sums of world_size processes
    stop          see topic_cloze
    """
    device, sums = next(model.parameters()).device, {}
    for kind, source in sources.items():
        sums[kind] = np.zeros(4)
        mine = np.arange(rank, n_sequences, world_size)
        for index in np.array_split(mine, max(1, -(-len(mine) * length // batch_tokens))):
            if len(index) == 0 or stop:
                continue
            rows = sample({kind: source}, {kind: 1}, seed, VALIDATION, index, length + 1, model.config, *spans)
            tokens = torch.from_numpy(rows).to(device)
            ids, targets = tokens[:, :-1], tokens[:, 1:]
            layout = make_layout(ids, targets, model.config)
            if kind == "text":
                layout = layout._replace(speech=None)  # the speech modules are not needed
            with torch.inference_mode():
                out = model(ids, targets, layout)
            sums[kind] += [float(out.text_nll.cpu().double().sum()), float(out.speech_nll.cpu().double().sum()),
                           len(out.text_nll), len(out.speech_nll)]
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# tasks

@dataclass
class Evaluator:
    """What a benchmark needs to score a model, and its records for the results file."""
    task: str
    model: SmolTolk
    tokenizer: Tokenizer
    made_with: tuple           # hashes of tokenizer and units; see runtime.checkpoint.made_with
    settings: SimpleNamespace
    world: World
    path: Path                 # the evaluation.json to be written
    has_speech: bool           # False for a SmolLM model, which only reads text
    used: list = field(default_factory=list)   # the files that were read
    notes: dict = field(default_factory=dict)  # other facts for the results

    def log_likelihood(self, sequences, spans, progress=""):
        return log_likelihood(self.model, sequences, spans, self.settings.batch_tokens, f"{self.task} {progress}",
                              self.world)


def score_windows(evaluator, sets, protocol):
    """({kind: {modality: nats}}, {}) for random windows of the data sets in settings.val_KIND."""
    settings, world, sources = evaluator.settings, evaluator.world, {}
    for kind in ("text", "speech", "interleaved"):
        if folders := getattr(settings, f"val_{kind}"):
            sources[kind] = open_source(kind, folders, *evaluator.made_with, settings.sequence_length + 1)
            evaluator.used += [shard.folder / "meta.json" for shard in sources[kind].shards]
    sums = heldout_nll(evaluator.model, sources, settings.seed, settings.val_sequences, settings.sequence_length,
                       (settings.text_span, settings.speech_span), settings.batch_tokens, world.rank, world.size)
    return report.nll_table({kind: all_sum(values, world).numpy() for kind, values in sums.items()}), {}


# Each function takes (evaluator, data, protocol) and returns (result, {name: array with one value per item}).
TASKS = dict(blimp=score_blimp, sblimp=score_sblimp, tstorycloze=storycloze.score, sstorycloze=storycloze.score,
             topic_cloze=storycloze.score_paired, mmlu=score_mmlu,
             librispeech=partial(score_documents, stream="speech"), text=partial(score_documents, stream="text"),
             nll=score_windows)
SPEECH_TASKS = ("sblimp", "librispeech", "nll")  # a plain SmolLM cannot do these


def data_of(task, settings):
    """The data of a task: a path or a list of data sets."""
    if task == "nll":
        return [*settings.val_text, *settings.val_speech, *settings.val_interleaved]
    return getattr(settings, "cloze" if task == "topic_cloze" else task)


def choose_tasks(settings, folder):
    """The tasks to score: settings.tasks, or those whose data is set, or topic_cloze and nll. ValueError.

    If topic_cloze or nll is to be scored and its data is not set, the data is filled in: that of the demo.
    """
    has_speech, demo = (folder / "speech.safetensors").exists(), demo_of(folder)
    chosen = settings.tasks or [task for task in TASKS if data_of(task, settings)] or ["topic_cloze", "nll"]
    if "topic_cloze" in chosen:
        settings.cloze = settings.cloze or f"{demo}/cloze"
    if "nll" in chosen and not data_of("nll", settings):
        settings.val_text = settings.val_speech = settings.val_interleaved = [f"{demo}/val"]
    for task in chosen:
        if task not in TASKS:
            raise ValueError(f"tasks: no task {task}; choose among {', '.join(TASKS)}")
        if not has_speech and task in SPEECH_TASKS:
            raise ValueError(f"tasks: {task} needs speech, and this checkpoint has no speech.safetensors")
        data = data_of(task, settings)
        if not data:
            raise ValueError(f"tasks: {task} has no data; set --{task}")
        for path in [data] if isinstance(data, str) else data:
            if not Path(path).exists():
                raise ValueError(f"{path}: no such file or folder; {task} needs it")
    return chosen


def score_checkpoint(folder, settings, world, path):
    """Score the tasks -> results. Writes them to path (a .json), tables to the .md, values of items to the .items/."""
    folder = Path(folder)
    has_speech, hashes = (folder / "speech.safetensors").exists(), made_with(folder)
    chosen = choose_tasks(settings, folder)
    if settings.units:
        hear.check_units(settings.units, folder)
    model, tokenizer = from_pretrained(folder).to(world.device).eval(), Tokenizer(folder / "tokenizer.json")
    share_cores(model)

    weights = [file for file in sorted(folder.glob("*.safetensors")) if file.stem != "optimizer"]
    training = read_json(folder / "train.json") if (folder / "train.json").exists() else {}
    n_text, n_speech = count_parameters(model)
    if settings.dtype == "float32":
        pack_weights(model, rows=settings.batch_tokens)
    results = dict(checkpoint=str(folder), sha256={file.name: digest(file) for file in weights},
                   parameters=n_text + n_speech if has_speech else n_text,
                   tokens=training.get("place", {}).get("tokens"), settings=vars(settings), processes=world.size,
                   device=world.device.type, torch=torch.__version__, made={})
    for task in chosen:
        began, protocol = time.perf_counter(), settings.protocol.get(task, {})
        evaluator = Evaluator(task, model, tokenizer, hashes, settings, world, path, has_speech)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            results[task], items = TASKS[task](evaluator, data_of(task, settings), protocol)
        results["made"][task] = dict(protocol=protocol, files=hear.fingerprint(evaluator.used), items=list(items),
                                     left_out=unused_files(data_of(task, settings), evaluator.used),
                                     notes=evaluator.notes, seconds=time.perf_counter() - began)
        if world.rank == 0:
            path.with_suffix(".items").mkdir(exist_ok=True)
            for name, array in items.items():
                np.save(report.item_path(path, task, name), array)
            write(results, path)
    return results


def unused_files(data, used):
    """{number, first} of the files in a benchmark's folder that were not used. Of data sets all files are used."""
    unused = sorted(str(path) for path in {*find_files(data, hidden=True)} - {*used}) if isinstance(data, str) else []
    return dict(number=len(unused), first=unused[:5])


def write(results, path):
    path.write_text(json.dumps(results, indent=1))
    path.with_suffix(".md").write_text(report.as_markdown(results), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints and settings

def newest_checkpoint(folder):
    """The newest checkpoint of a run that can be read, or the folder itself if it holds a model. SystemExit."""
    folder = Path(local_folder(folder))
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return folder
    found, bad = newest(folder, to_train=False)
    if found is None:
        raise SystemExit(f"{folder}: no {'good ' if bad else ''}checkpoint here; give --checkpoint=FOLDER of a run or a"
                         f" model, or train one, for example with python train.py config/train_tiny.py")
    return found


def results_folder(checkpoint):
    """The folder for the results of a checkpoint in hf: or in assets/, where nothing is written. For others ""."""
    if not checkpoint.startswith(("hf:", "assets/")):
        return ""
    folder = Path("out", checkpoint.removeprefix("hf:").removeprefix("assets/").replace("/", "--"))
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def check_spans(settings):
    """SystemExit if the lengths of spans in interleaved sequences are invalid."""
    for key in ("text_span", "speech_span"):
        span = getattr(settings, key)
        if [type(n) for n in span] != [int, int] or not 1 <= span[0] <= span[1]:
            raise SystemExit(f"{key}={span}: give the fewest and the most words of a span, like [5, 15]")


def check_settings(settings, path):
    """SystemExit for invalid settings, before anything is scored. path: the results file."""
    check_spans(settings)
    if settings.dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"dtype={settings.dtype}: choose float32 or bfloat16")
    for task, options in settings.protocol.items():
        for key in CHOICES.keys() & options:
            if options[key] not in CHOICES[key]:
                raise SystemExit(f"protocol.{task}.{key}={options[key]}: choose {' or '.join(CHOICES[key])}")
        if options.get("prefix", 0) < 0:
            raise SystemExit(f"protocol.{task}.prefix={options['prefix']}: give 0, or the number of tokens")
    if not path.parent.is_dir() or path.suffix != ".json":
        raise SystemExit(f"out={path}: give the name of a .json file in an existing folder")
    if settings.versus.endswith(".json") and not Path(settings.versus).is_file():
        raise SystemExit(f"versus={settings.versus}: no such file")
    if settings.before and not settings.mmlu:
        raise SystemExit(f"before={settings.before}: this model is scored on MMLU alone; set --mmlu too")


def main(argv):
    values, _ = configure(DEFAULTS, argv)
    settings = SimpleNamespace(**values)
    world = join_world(settings.device)
    settings.batch_tokens = settings.batch_tokens or (512 if world.device.type == "cpu" else 16384)
    settings.protocol = {task: options | settings.protocol.get(task, {})
                         for task, options in DEFAULTS["protocol"].items()}
    given = settings.checkpoint
    for key in ("checkpoint", "before", "versus"):
        folder = getattr(settings, key)
        if folder and not folder.endswith(".json"):
            # One process chooses for all, because a run may still be writing checkpoints.
            found = on_first(lambda folder=folder: str(newest_checkpoint(folder)), world)
            setattr(settings, key, found)
    path = Path(settings.out or Path(results_folder(given) or settings.checkpoint) / "evaluation.json")
    check_settings(settings, path)
    try:
        results = score_checkpoint(settings.checkpoint, settings, world, path)
        if settings.before and "mmlu" in results:
            mmlu_alone = SimpleNamespace(**vars(settings) | dict(tasks=["mmlu"]))
            before = score_checkpoint(settings.before, mmlu_alone, world, path.with_name(f"{path.stem}.before.json"))
            results["before"] = before["mmlu"]
        second = Path(settings.versus)
        if settings.versus and second.suffix != ".json":
            second = path.with_name(f"{path.stem}.versus.json")
            score_checkpoint(settings.versus, settings, world, second)
        if settings.versus and world.rank == 0:
            results["versus"] = dict(checkpoint=settings.versus, scores=report.compare_results(path, second))
    except ValueError as error:  # its message names the file and the fault
        raise SystemExit(str(error)) from None
    if world.rank == 0:
        write(results, path)
        print(report.as_text(results))
        print(f"written to {path}, {path.with_suffix('.md')}, {path.with_suffix('.items')}")
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
