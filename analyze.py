"""
The numbers behind the paper's figures and Table 3, from checkpoints and data.

    python analyze.py segmentation --checkpoint=out/train_tiny        Table 3: words found in the selector's weights
    python analyze.py weights      --checkpoint=out/train_tiny        Figures 5, 7, 8, 9: omega and phi
    python analyze.py dimension    --checkpoint=out/train_tiny,out/baseline_tiny     Figure 3: intrinsic dimension
    python analyze.py overlap      --checkpoint=out/train_tiny,out/baseline_tiny     Figure 4: shared subspaces
    python analyze.py scaling      --checkpoint=out/train_tiny,out/baseline_tiny     Figures 2, 6: any logged metric

Each command writes a json, a csv and a png to --out; tools/figures.py draws the png from the json. --checkpoint names
runs, of which the newest checkpoint is taken, or folders of models. `python analyze.py --help` lists all settings.

Conventions. Layer 0 is the input to the backbone. Layer L is the last one, after the final norm. The model reads the
speech EOS and then units. The omega of a unit is taken where that unit has just been read, as in Eq. 3, and a peak says
that a word begins with it. With --omega_at=predicted it is taken one place earlier, where the unit is predicted. The
start and the end of an utterance are not counted as boundaries.
"""
import csv
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.signal import find_peaks
from tqdm import tqdm

from benchmarks.utterances import open_tokenizer, read_utterances
from configurator import configure, nearest
from data import open_source
from evaluate import newest_checkpoint
from model import TEXT_ONLY, from_pretrained
from runtime.checkpoint import made_with
from runtime.devices import pick_device
from runtime.log import flat, read_log

checkpoint = "out/train_tiny"   # folders of runs or of models, separated by commas
data = "data/demo/test"         # a paired set; segmentation and weights also take recordings, see corpus
val = "data/demo/val"           # the same, for tuning the segmentation
text = ""                       # dimension: take the text from this set, paired or text, instead of data
corpus = ""                     # timit, manifest ...: data and val are folders for corpora/NAME.py, with true times
units = ""                      # folder of the speech units: for corpus, and for the mean durations of units
out = ""                        # folder for the results; default: analysis, in the folder of the first run
device = "auto"                 # "cuda", "cpu", "mps", or the best one there is
batch_tokens = 8192             # positions in one forward pass
seed = 1
utterances = 2000               # segmentation, weights: the most utterances that are read
tolerance = 1                   # segmentation: largest distance of a hit from a true boundary, in units
tolerance_ms = 40.0             # and in milliseconds
omega_at = "read"               # a unit's omega is taken where it is "read", or one place before: "predicted"
utterance = 0                   # weights: number of the utterance that is drawn
drawn_units = 120               # and how many of its units
words = 20                      # dimension, overlap: words in a subsequence; its last token stands for it
points = 10_000                 # subsequences in a batch, or fewer if the data holds fewer
batches = 5                     # disjoint batches
clip = 0.95                     # clip elements at this quantile of their absolute values, layer by layer
max_rank = 2**13                # dimension: rank of the farthest neighbour
scale = 0                       # neighbour rank n, a power of 2, at which the dimension is read off; 0: the plateau
components = 50                 # overlap: principal components
bootstrap = 50                  # overlap: bootstrap samples for the band
metrics = "nll/speech/speech,topic_cloze/S/accuracy,topic_cloze/T->S/accuracy,topic_cloze/S->T/accuracy"  # scaling

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_")}
PROMINENCES = np.arange(1, 16) / 100  # (0, 0.15] in steps of 0.01, Appendix C.2


# ---------------------------------------------------------------------------------------------------------------------
# models

class Model(NamedTuple):
    name: str
    folder: Path
    net: torch.nn.Module
    speaks: bool  # False: the folder of a text model, whose speech modules are random


def named_folders(checkpoint):
    """{name: folder} of the folders in --checkpoint. Where short names are not unique, paths are the names."""
    folders = [Path(folder) for folder in checkpoint.split(",")]
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"checkpoint={checkpoint}: names the same folder twice")
    names = [path.parent.name if path.name.startswith("checkpoint-") else path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path).strip("/").replace("/", "-") for path in paths]
    return dict(zip(names, folders))


def open_models(settings):
    """A list with one Model for each folder in --checkpoint."""
    models = []
    for name, folder in named_folders(settings.checkpoint).items():
        folder = newest_checkpoint(folder)
        net = from_pretrained(folder).to(settings.device).eval()
        models.append(Model(name, folder, net, (folder / "speech.safetensors").exists()))
    return models


def open_models_with_selector(settings):
    models = open_models(settings)
    for model in models:
        if not model.speaks or model.net.config.layer_pooling != "dynamic":
            raise ValueError(f"{model.folder}: has no trained layer selector (layer_pooling='dynamic')")
    return models


def run_in_batches(net, sequences, batch_tokens, layout=None):
    """Yield (indices of sequences, their lengths, Output), from the longest sequences to the shortest.

    sequences: arrays of ids. They are padded on the right, which a causal model does not see.
    """
    lengths = np.array([len(ids) for ids in sequences])
    order = np.argsort(-lengths, kind="stable")
    device = next(net.parameters()).device
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        chosen = order[begin:begin + max(1, batch_tokens // longest)]
        ids = np.zeros((len(chosen), longest), np.int64)
        for row, i in zip(ids, chosen):
            row[:lengths[i]] = sequences[i]
        with torch.inference_mode():
            output = net(torch.from_numpy(ids).to(device), layout=layout)
        yield chosen, lengths[chosen], output
        begin += len(chosen)


def last_hidden(net, sequences, batch_tokens, text=False):
    """Hidden states at the last token of each sequence -> float32 [L + 1, n, d]. text: do they hold text alone?"""
    states = np.empty((net.config.num_hidden_layers + 1, len(sequences), net.config.hidden_size), np.float32)
    for chosen, lengths, output in run_in_batches(net, sequences, batch_tokens, TEXT_ONLY if text else None):
        rows, last = torch.arange(len(chosen)), torch.from_numpy(lengths - 1)
        for layer, hidden in enumerate(output.hidden):
            states[layer, chosen] = hidden[rows, last].float().cpu().numpy()
    return states


def layer_weights(net, utterances, batch_tokens, omega_at):
    """omega of each utterance, a list of float32 [units, L]. omega_at: "read" or "predicted"."""
    sequences = [[net.config.speech_eos, *(u.units + net.config.vocab_size)] for u in utterances]
    omega = [None] * len(utterances)
    for chosen, lengths, output in run_in_batches(net, sequences, batch_tokens):
        for i, length, row in zip(chosen, lengths, output.log_omega.exp().cpu().numpy()):
            omega[i] = row[1:length] if omega_at == "read" else row[:length - 1]
    return omega


# ---------------------------------------------------------------------------------------------------------------------
# subsequences of words and their hidden states, for intrinsic dimension and overlap (Appendix C.1)

def word_table(shard, stream, tokenizer, longest=1 << 24):
    """(offsets of words in a stream [w + 1], first words of documents [d + 1]) of an opened data set.

    A text set has no word offsets. There a word begins with a space; only the first `longest` tokens are looked at.
    """
    if shard.text_words is not None:
        return (shard.text_words if stream == "text" else shard.speech_words), shard.documents
    ids, documents = np.asarray(shard.text[:longest]), shard.documents[shard.documents <= longest]
    begins_word = np.zeros(tokenizer.vocab_size, bool)
    for i in np.unique(ids):
        begins_word[i] = i == tokenizer.eos or tokenizer.decode_bytes([i])[:1].isspace()
    first = begins_word[ids]
    first[documents[documents < len(ids)]] = True
    offsets = np.append(np.flatnonzero(first), len(ids))
    return offsets, np.searchsorted(offsets, documents)


def subsequences(shards, streams, words, count, seed, tokenizer=None):
    """Up to `count` different random subsequences of so many words, none with the end of a document inside.

    Returns {stream: list of int64 arrays}, ids as the shards hold them. All streams have the same words.
    """
    tables = [{stream: word_table(shard, stream, tokenizer) for stream in streams} for shard in shards]
    shard_ends = np.cumsum([len(table[streams[0]][0]) - 1 for table in tables])  # in words
    rng, n_words = np.random.default_rng(seed), shard_ends[-1]
    starts = n_words if n_words < 1 << 24 else np.unique(rng.integers(n_words, size=16 * count))
    found = {stream: [] for stream in streams}
    for start in rng.permutation(starts):
        s = int(np.searchsorted(shard_ends, start, side="right"))
        first = start - (shard_ends[s - 1] if s else 0)
        documents = tables[s][streams[0]][1]
        following = np.searchsorted(documents, first, side="right")  # the document after this one
        if following == len(documents) or first + words > documents[following] - 1:  # the last word is the EOS
            continue
        for stream in streams:
            offsets, tokens = tables[s][stream][0], getattr(shards[s], stream)
            found[stream].append(tokens[offsets[first]:offsets[first + words]].astype(np.int64))
        if len(found[streams[0]]) == count:
            break
    return found


def clip_outliers(x, quantile):
    """x [n, d] with its elements clipped at the given quantile of their absolute values."""
    limit = np.quantile(np.abs(x), quantile)
    return np.clip(x, -limit, limit)


def representations(model, folder, streams, settings):
    """{stream: float32 [L + 1, n, d]}: clipped last-token states of random subsequences, n a multiple of --batches."""
    kind = "interleaved" if "speech" in streams else "text"
    shards, tokenizer = open_source(kind, [folder], *made_with(model.folder)).shards, open_tokenizer(model.folder)
    if shards[0].text_words is None and tokenizer is None:
        raise ValueError(f"{folder}: a text set, and {model.folder} has no tokenizer.json to find its words with")
    found = subsequences(shards, streams, settings.words, settings.points * settings.batches, settings.seed, tokenizer)
    batches = settings.batches
    n = len(found[streams[0]]) // batches * batches
    if n < 3 * batches:
        raise ValueError(f"{folder}: {n} subsequences of {settings.words} words, too few for {batches} batches")
    states = {}
    for stream, sequences in found.items():
        if not all(map(len, sequences)):
            raise ValueError(f"{folder}: {settings.words} words in a row without a unit; set --words higher")
        shift = model.net.config.vocab_size if stream == "speech" else 0
        sequences = [ids + shift for ids in sequences[:n]]
        states[stream] = last_hidden(model.net, sequences, settings.batch_tokens, text=stream == "text")
        for layer, x in enumerate(states[stream]):
            states[stream][layer] = clip_outliers(x, settings.clip)
    return states


# ---------------------------------------------------------------------------------------------------------------------
# word segmentation

def r_value(precision, recall):
    """The R-value (Räsänen et al. 2009), 1 for perfect, of precision and recall in 0..1 (numbers or arrays)."""
    precision, recall = np.asarray(precision, float), np.asarray(recall, float)
    # Over-segmentation is recall / precision - 1. It is -1 where there is no hit.
    ratio = np.divide(recall, precision, out=np.zeros_like(recall * precision), where=precision > 0)
    over = ratio - 1
    r1 = np.sqrt((1 - recall) ** 2 + over ** 2)
    r2 = (-over + recall - 1) / np.sqrt(2)
    return 1 - (np.abs(r1) + np.abs(r2)) / 2


def match(predicted, true, tolerance, one_to_one=False):
    """Which positions in two ascending arrays have a partner in the other: (bool [predicted], bool [true]).

    By default a position is a hit if any position of the other array lies within the tolerance, so one can serve
    several (Kreuk et al. 2020). one_to_one: the largest matching in which each has at most one partner.
    """
    predicted, true = np.asarray(predicted, float), np.asarray(true, float)
    reach = tolerance + 1e-6  # far below a unit or a millisecond, far above rounding
    if one_to_one:
        return match_one_to_one(predicted, true, reach)

    def has_near(a, b):
        return np.searchsorted(b, a + reach, side="right") > np.searchsorted(b, a - reach)
    return has_near(predicted, true), has_near(true, predicted)


def match_one_to_one(predicted, true, reach):
    """From left to right, join the first two that are close enough. This is optimal, as all have the same reach."""
    hit_predicted, hit_true = np.zeros(len(predicted), bool), np.zeros(len(true), bool)
    p, t = predicted.tolist(), true.tolist()
    i = j = 0
    while i < len(p) and j < len(t):
        if abs(p[i] - t[j]) <= reach:
            hit_predicted[i] = hit_true[j] = True
            i, j = i + 1, j + 1
        elif p[i] < t[j]:
            i += 1
        else:
            j += 1
    return hit_predicted, hit_true


class Axis(NamedTuple):
    """Utterances laid end to end on one axis, in units or in seconds, with gaps wider than any tolerance."""
    position: np.ndarray  # float64, of every unit
    true: np.ndarray      # float64, of the boundaries
    edges: np.ndarray     # float64 [utterances + 1], in the gaps


def lay_out(utterances, measure, gap=1000):
    """The Axis of a list of Utterance; measure: "units" or "seconds"."""
    if measure == "units":
        starts, true = [np.arange(len(u.units) + 1.0) for u in utterances], [u.boundaries() for u in utterances]
    else:
        starts, true = [u.starts for u in utterances], [u.boundary_times() for u in utterances]
    begin = np.cumsum([0, *(s[-1] + gap for s in starts)])
    return Axis(np.concatenate([s[:-1] + b for s, b in zip(starts, begin)]),
                np.concatenate([t + b for t, b in zip(true, begin)]), begin - gap / 2)


def count_hits(predicted, axis, tolerance, one_to_one=False):
    """int64 [utterances, 4]: predicted boundaries that hit, all of them, true boundaries that are hit, all of them."""
    hit_predicted, hit_true = match(predicted, axis.true, tolerance, one_to_one)
    positions = predicted[hit_predicted], predicted, axis.true[hit_true], axis.true
    return np.stack([np.histogram(x, axis.edges)[0] for x in positions], axis=1)


def scores(counts):
    """Precision, recall, F1 and R-value in percent from counts [..., 4] like those of count_hits."""
    hit_predicted, n_predicted, hit_true, n_true = np.moveaxis(np.asarray(counts, float), -1, 0)
    precision, recall = hit_predicted / np.maximum(1, n_predicted), hit_true / np.maximum(1, n_true)
    f1 = 2 * precision * recall / np.maximum(1e-12, precision + recall)
    return dict(precision=100 * precision, recall=100 * recall, f1=100 * f1, r_value=100 * r_value(precision, recall))


class Method(NamedTuple):
    """A way of finding word boundaries in the utterances of one split."""
    values: np.ndarray  # of its one parameter, to choose among on the validation split
    predict: Callable   # value -> boundaries, as indices into all units of the split, int64


class Split(NamedTuple):
    utterances: list
    methods: dict  # {name: Method}


def peaks(signals, values, step=1.0):
    """The Method that sets a boundary at each peak with a prominence of at least value * step.

    signals: a list of float [units]. The ends of a signal are never peaks.
    """
    positions, prominences, offset = [], [], 0
    for signal in signals:
        found, properties = find_peaks(signal, prominence=0)
        positions.append(offset + found)
        prominences.append(properties["prominences"])
        offset += len(signal)
    positions, prominences = np.concatenate(positions), np.concatenate(prominences)
    return Method(values, lambda least: positions[prominences >= least * step])


def baselines(utterances, rng):
    """{name: Method} of methods without a model: chance and, where times are known, slow changes of units."""
    within = np.concatenate([np.arange(len(u.units)) for u in utterances])  # position of a unit in its utterance
    draws = np.where(within > 0, rng.random(len(within)), 1)  # an utterance does not begin with a boundary

    def every(k):
        return np.flatnonzero((within % k == 0) & (within > 0))
    methods = {}
    if utterances[0].starts is not None:  # the rate of changes is 1 / duration of the unit before
        durations = [np.append(0, np.diff(u.starts)[:-1]) for u in utterances]
        methods["unit-change rate, where it falls"] = peaks(durations, np.arange(1, 17), step=0.01)  # in seconds
    methods["random"] = Method(np.arange(1, 21) / 40, lambda rate: np.flatnonzero(draws < rate))
    methods["every k units"] = Method(np.arange(1, 21), every)
    methods["every unit change"] = Method(np.ones(1), every)
    return methods


def tune_and_score(val, test, measure, tolerance, one_to_one, seed):
    """For each method of two Splits, a row with its scores in percent on test, at its best value on val.

    The best value is that with the highest R-value. The standard error of the R-value is a bootstrap over utterances.
    """
    val_axis, test_axis, rows = lay_out(val.utterances, measure), lay_out(test.utterances, measure), []
    for name, (values, predict) in val.methods.items():
        if name not in test.methods:  # only one of the splits has times
            continue
        curve = []
        for value in values:
            counts = count_hits(val_axis.position[predict(value)], val_axis, tolerance, one_to_one)
            curve.append(float(scores(counts.sum(0))["r_value"]))
        best = values[int(np.argmax(curve))]
        counts = count_hits(test_axis.position[test.methods[name].predict(best)], test_axis, tolerance, one_to_one)
        total = {key: float(value) for key, value in scores(counts.sum(0)).items()}
        rows.append(dict(method=name, setting=float(best), **total, r_value_stderr=r_value_error(counts, seed),
                         predicted=int(counts[:, 1].sum()), true=int(counts[:, 3].sum()),
                         settings=values, validation=curve))
    return rows


def r_value_error(counts, seed, samples=200):
    """Standard error of the R-value in percent, from counts int64 [utterances, 4] of utterances drawn anew."""
    n = len(counts)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, utterances]
    return float(scores(drawn @ counts)["r_value"].std())


def segmentation(settings):
    """Table 3, with methods that need no model for comparison."""
    rows, about = [], {}
    for model in open_models_with_selector(settings):
        val, test = (open_split(folder, model, settings) for folder in (settings.val, settings.data))
        timed = val.utterances[0].starts is not None and test.utterances[0].starts is not None
        for row in segmentation_rows(val, test, timed, settings):
            needs_model = row["method"].startswith("omega")
            if needs_model or not about:  # the other methods are the same for all models
                rows.append(dict(model=model.name if needs_model else "", **row))
        times = "true" if settings.corpus else "estimated: mean duration of each unit"
        about[model.name] = dict(checkpoint=str(model.folder), utterances=len(test.utterances),
                                 validation_utterances=len(val.utterances), times=timed and times)
    print_segmentation(rows)
    table = [{key: row[key] for key in row if key not in ("settings", "validation")} for row in rows]
    save("segmentation", settings, table, models=about, rows=rows)


def open_split(folder, model, settings):
    """The Split of a folder's utterances, whose methods are the peaks of each layer's omega, and the baselines."""
    utterances = read_utterances(folder, model, settings)
    omega = layer_weights(model.net, utterances, settings.batch_tokens, settings.omega_at)
    methods, L = {}, model.net.config.num_hidden_layers
    for layer in range(L, 0, -1):
        name = f"omega of layer {layer}" + (", the last" if layer == L else "")
        methods[name] = peaks([of_utterance[:, layer - 1] for of_utterance in omega], PROMINENCES)
    return Split(utterances, methods | baselines(utterances, np.random.default_rng(settings.seed)))


def segmentation_rows(val, test, timed, settings):
    """The rows of tune_and_score for both kinds of matching, in units and, where times are known, in milliseconds."""
    cases = [("units", settings.tolerance, f"{settings.tolerance:g} units")]
    if timed:
        cases.append(("seconds", settings.tolerance_ms / 1000, f"{settings.tolerance_ms:g} ms"))
    rows = []
    for (measure, tolerance, within), matching in itertools.product(cases, ["nearest", "one-to-one"]):
        for row in tune_and_score(val, test, measure, tolerance, matching == "one-to-one", settings.seed):
            rows.append(dict(within=within, matching=matching, **row))
    return rows


def print_segmentation(rows):
    title = None
    for row in rows:
        if row["model"] and "the last" not in row["method"]:
            continue
        its_title = f"within {row['within']}, {row['matching']} matching, %"
        if title != its_title:
            title = its_title
            print(f"\n{title:52}  setting  precision  recall     F1  R-value")
        print(f"{row['model']:20}{row['method']:32}{row['setting']:9.3g}{row['precision']:11.1f}{row['recall']:8.1f}"
              f"{row['f1']:7.1f}{row['r_value']:9.1f} ± {row['r_value_stderr']:.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# layer weights

def near_boundaries(utterances, omega, shift):
    """The last layer's omega at all units that come `shift` units after the first unit of a word, float32 [n]."""
    values = []
    for utterance, its_omega in zip(utterances, omega):
        positions = utterance.boundaries() + shift
        positions = positions[(positions >= 0) & (positions < len(its_omega))]
        values.append(its_omega[positions, -1])
    return np.concatenate(values)


def summarise_weights(utterances, omega):
    """Statistics of omega over all units, as a dict. omega: a list of float [units, L]."""
    everywhere = np.concatenate(omega)  # [units of all utterances, L]
    around = {shift: near_boundaries(utterances, omega, shift) for shift in range(-4, 5)}
    return dict(omega_mean=everywhere.mean(0), units=len(everywhere),
                omega_quantiles={q: np.quantile(everywhere, q, axis=0) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
                entropy=-float((everywhere * np.log(everywhere + 1e-30)).sum(1).mean()),  # in nats
                last_layer_around_boundaries={shift: float(x.mean()) for shift, x in around.items()},
                last_layer_around_boundaries_stderr={shift: float(x.std() / len(x) ** 0.5)
                                                     for shift, x in around.items()})


def weights(settings):
    """omega along one utterance, phi, and the distribution of omega over layers (Figures 5, 7, 8, 9)."""
    rows, about = [], {}
    for model in open_models_with_selector(settings):
        utterances = read_utterances(settings.data, model, settings)
        if not 0 <= settings.utterance < len(utterances):
            raise ValueError(f"--utterance={settings.utterance}: {settings.data} has 0 to {len(utterances) - 1}")
        omega = layer_weights(model.net, utterances, settings.batch_tokens, settings.omega_at)
        drawn, drawn_omega = utterances[settings.utterance], omega[settings.utterance]
        rows += weight_rows(model.name, drawn, drawn_omega)
        about[model.name] = dict(
            checkpoint=str(model.folder), phi=model.net.phi.detach().softmax(0).cpu().numpy(),
            **summarise_weights(utterances, omega),
            utterance=dict(words=drawn.words, offsets=drawn.offsets, omega=drawn_omega[:settings.drawn_units]))
    save("weights", settings, rows, models=about)


def weight_rows(name, utterance, omega):
    """One row for each unit and layer of an utterance, omega [units, L]."""
    boundaries, rows = set(utterance.boundaries().tolist()), []
    for position, unit in enumerate(utterance.units):
        word = utterance.words[np.searchsorted(utterance.offsets, position, side="right") - 1]
        for layer, weight in enumerate(omega[position], start=1):
            rows.append(dict(model=name, position=position, unit=int(unit), boundary=int(position in boundaries),
                             word=word, layer=layer, omega=float(weight)))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# intrinsic dimension: GRIDE (Denti et al. 2022), as in dadapy

class Gride(NamedTuple):
    """One estimate for each pair of neighbour ranks (n, 2n)."""
    ids: np.ndarray      # intrinsic dimension; inf: above 1000
    errors: np.ndarray   # its standard error
    scales: np.ndarray   # mean distance of the two neighbours
    ranks: np.ndarray    # n
    points: int          # distinct points


@torch.inference_mode()
def neighbour_distances(x, ranks, device="cpu", at_once=1 << 24):
    """Distances of each point to its neighbours of given ranks (1: the nearest): [N, D] -> float64 [N, ranks].

    They are computed in float32, and again in float64 where the nearest neighbour is so close, compared with the
    distance from the centre, that rounding would show. at_once: the number of distances in memory at a time.
    """
    ranks = torch.as_tensor(ranks, device=device)
    exact = torch.as_tensor(x, device=device).double()
    exact = exact - exact.mean(0)
    norms, single = exact.square().sum(1), exact.float()  # [N], [N, D]
    block, found = max(1, at_once // len(exact)), []
    for rows in torch.arange(len(exact), device=device).split(block):
        squares = squared_distances(single, norms.float(), rows, ranks)
        close = (squares[:, 0] < norms[rows] / 256).nonzero()[:, 0]
        for part in close.split(max(1, block // 2)):
            squares[part] = squared_distances(exact, norms, rows[part], ranks)
        found.append(squares)
    return torch.cat(found).clamp(min=1e-30).sqrt().cpu().numpy()


def squared_distances(x, norms, rows, ranks):
    """Squared distances of the points `rows` of x [N, D] to their neighbours of given ranks -> float64 [rows, ranks].

    |a - b|^2 = |b|^2 - 2ab + |a|^2. norms [N] holds |a|^2 of all points. Within a row |a|^2 is the same, so it
    does not change the order, and is added at the end.
    """
    squares = torch.addmm(norms[None], x[rows], x.T, alpha=-2)  # [rows, N]
    squares[torch.arange(len(rows), device=x.device), rows] = -torch.inf  # a point is its own neighbour of rank 0
    if squares.is_cuda:
        squares = squares.sort(dim=1).values
    else:
        squares.numpy().sort(axis=1)  # in place; on a CPU many times faster than torch's sort
    return (squares[:, ranks] + norms[rows, None]).double()


def gride(x, max_rank=2**13, device="cpu"):
    """Intrinsic dimension of the points x [N, D] at all scales n = 1, 2, 4 .. max_rank / 2 -> Gride.

    Equal points count once. Ranks end below the number of points. With fewer than 3 different points, as layer 0 of
    text may have, the dimension is nan. ValueError for values that are not finite.
    """
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise ValueError(f"points {x.shape} hold values that are not finite")
    x = np.unique(x, axis=0)
    if len(x) < 3:
        return Gride(*np.full((3, 1), np.nan), np.ones(1, int), len(x))
    top = int(np.log2(min(max_rank, len(x) - 1)))
    r = neighbour_distances(x, 2 ** np.arange(top + 1), device)  # [N, top + 1]
    ids, errors = np.array([gride_at(r[:, i + 1] / r[:, i], 2**i) for i in range(top)]).T
    return Gride(ids, errors, (r[:, :-1] + r[:, 1:]).mean(0) / 2, 2 ** np.arange(top), len(x))


def gride_at(mu, n):
    """(dimension, its standard error) from the ratios mu [N] of the distances to neighbours 2n and n.

    With mu = r_2n / r_n, n1 = n and n2 = 2n, the maximum of the likelihood solves
        (N - 1)/d + (n2 - n1 - 1) sum ln(mu)/(1 - mu^-d) - (n2 - 1) sum ln(mu) = 0,
    whose left side falls with d. Far outliers of mu are left out of it, as in dadapy.
    """
    mu = np.where(mu == 1, 1 + 10 * np.finfo(float).eps, mu)
    q50, q95 = np.quantile(mu, [0.5, 0.95])
    kept = mu[mu < 20 * (q95 - q50) + q50]
    log_kept = np.log(kept if len(kept) > 1 else mu)

    def slope(d):  # -expm1 is 1 - mu^-d without the loss of digits
        return ((len(log_kept) - 1) / d + (n - 1) * (log_kept / -np.expm1(-d * log_kept)).sum()
                - (2 * n - 1) * log_kept.sum())

    if slope(1e3) > 0:
        return np.inf, np.nan
    if slope(1e-3) < 0:
        return 0.0, np.nan
    d, log = brentq(slope, 1e-3, 1e3, xtol=1e-9), np.log(mu)
    curvature = len(mu) / d**2 + (n - 1) * ((log / np.expm1(-d * log)) ** 2 * np.exp(-d * log)).sum()
    return d, curvature ** -0.5


def plateau(ids, ranks, points):
    """Index of the scale in the middle of the flattest three neighbouring ones on the curve of ids over ranks n.

    Scales whose outer neighbour 2n is beyond a quarter of the points are left out: they see the edge of the data. 0 if
    fewer than three scales, or only undefined ones, remain.
    """
    logs = np.log(np.asarray(ids, float)[2 * np.asarray(ranks) <= points / 4])
    roughness = np.maximum(np.abs(logs[1:-1] - logs[:-2]), np.abs(logs[2:] - logs[1:-1]))
    return 1 + int(np.nanargmin(roughness)) if np.isfinite(roughness).any() else 0


def dimension_rows(batches, settings):
    """One row for each scale of a layer: means over its batches of points, a list of [N, D], and their deviation."""
    found = [gride(x, settings.max_rank, "cuda" if settings.device == "cuda" else "cpu") for x in batches]
    size, fewest = min(len(g.ids) for g in found), min(g.points for g in found)
    ids, errors, scales = (np.stack([g[i][:size] for g in found]) for i in range(3))  # each [batches, size]
    ranks, mean, deviation = found[0].ranks[:size], ids.mean(0), ids.std(0)
    if settings.scale:
        chosen = min(size - 1, int(np.log2(settings.scale)))
    else:
        chosen = plateau(mean, ranks, fewest)
    return [dict(n=int(ranks[i]), distance=scales.mean(0)[i], dimension=mean[i], deviation=deviation[i],
                 error=errors.mean(0)[i], chosen=int(i == chosen), distinct=fewest) for i in range(size)]


def dimension(settings):
    """Figure 3: GRIDE of text and of speech in each layer, at all scales."""
    rows, about = [], {}
    for model in open_models(settings):
        about[model.name] = dict(checkpoint=str(model.folder))
        folders = dict(text=settings.text or settings.data, speech=settings.data)
        for stream in ("text", "speech") if model.speaks else ("text",):
            states, chosen = representations(model, folders[stream], (stream,), settings)[stream], []
            for layer, x in enumerate(tqdm(states, desc=stream, disable=None)):
                of_layer = dimension_rows(np.split(x, settings.batches), settings)
                rows += [dict(model=model.name, modality=stream, layer=layer, **row) for row in of_layer]
                chosen += [row["dimension"] for row in of_layer if row["chosen"]]
            n = states.shape[1] // settings.batches
            about[model.name][stream] = dict(points=n)
            print(f"{model.name}, {stream}, {settings.batches} batches of {n}: dimension of layers 0 to L: "
                  + " ".join(f"{value:.1f}" for value in chosen))
    save("dimension", settings, rows, models=about, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def explained(points, k, counts=None):
    """How much of the variance of one set of points lies in the span of the top k principal components of another.

    points: {name: [n, d] tensor}, each centred on its own mean. counts [n]: how often each point counts.
    Returns {(whose variance, whose components): share in 0..1}. ValueError if a set has no variance.
    """
    covariance, top = {}, {}
    for name, x in points.items():
        w = torch.ones(len(x)).to(x) if counts is None else counts.to(x)
        centred = (x - (w @ x) / w.sum()) * w.sqrt()[:, None]
        covariance[name] = centred.T @ centred  # [d, d]
        if not covariance[name].trace() > 0:
            raise ValueError(f"{name}: {len(x)} points without variance, nothing to explain")
        top[name] = torch.linalg.eigh(covariance[name])[1][:, -k:]  # [d, k], as eigenvalues ascend
    shares = {}
    for a, b in itertools.product(points, points):
        shares[a, b] = float((top[b] * (covariance[a] @ top[b])).sum() / covariance[a].trace())
    return shares


def overlap_rows(points, draws, settings):
    """One row for each pair of modalities in a layer. points: {stream: [n, d] tensor}; draws int64 [bootstrap, n]."""
    n, d = points["text"].shape
    chunks = zip(*(x.chunk(settings.batches) for x in points.values()))
    batches = [explained(dict(zip(points, chunk)), settings.components) for chunk in chunks]
    resampled = [explained(points, settings.components, counts) for counts in draws]
    rows = []
    for pair, share in explained(points, settings.components).items():
        spread = np.array([shares[pair] for shares in resampled])  # their mean is biased, so only the spread is used
        low, high = share + np.quantile(spread - spread.mean(), [0.025, 0.975])
        of_batches = [shares[pair] for shares in batches]
        rows.append(dict(variance_of=pair[0], components_of=pair[1], share=share, low=float(low), high=float(high),
                         batches_mean=float(np.mean(of_batches)), batches_deviation=float(np.std(of_batches)),
                         random_subspace=min(1.0, settings.components / d), pairs=n))
    return rows


def overlap(settings):
    """Figure 4: the share of one modality's variance in the other's top principal components, in each layer."""
    rows, about, rng = [], {}, np.random.default_rng(settings.seed)
    for model in open_models(settings):
        if not model.speaks:
            raise ValueError(f"{model.folder}: a text model; overlap needs one that has learnt speech")
        states = representations(model, settings.data, ("text", "speech"), settings)
        n = states["text"].shape[1]
        draws = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=settings.bootstrap))
        for layer in tqdm(range(len(states["text"])), desc=model.name, disable=None):
            points = {stream: torch.from_numpy(x[layer]).to(settings.device) for stream, x in states.items()}
            rows += [dict(model=model.name, layer=layer, **row) for row in overlap_rows(points, draws, settings)]
        about[model.name] = dict(checkpoint=str(model.folder))
        print_overlap(model.name, rows, settings.components)
    save("overlap", settings, rows, models=about, rows=rows)


def print_overlap(name, rows, k):
    for pair in (("speech", "text"), ("text", "speech")):
        chosen = [row for row in rows if (row["model"], row["variance_of"], row["components_of"]) == (name, *pair)]
        print(f"{name}: % of {pair[0]} variance in {pair[1]}'s top {k}, layers 0 to L: "
              + " ".join(f"{100 * row['share']:.1f}" for row in chosen))


# ---------------------------------------------------------------------------------------------------------------------
# scaling

def scaling_rows(lines, names):
    """A row for each value of the named metrics in a run's log, with the tokens and FLOPs that were spent until then.

    lines: flat dicts. Lines of training have tokens and FLOPs; between them these are interpolated.
    """
    training = [dict(step=0, tokens=0, flops=0), *(line for line in lines if "flops" in line)]
    spent = {key: np.array([line[key] for line in training], float) for key in ("step", "tokens", "flops")}
    rows = []
    for line in lines:
        for name in names:
            if name in line:
                tokens, flops = (np.interp(line["step"], spent["step"], spent[key]) for key in ("tokens", "flops"))
                rows.append(dict(metric=name, step=line["step"], value=line[name], tokens=float(tokens),
                                 flops=float(flops)))
    return rows


def scaling(settings):
    """Figures 2 and 6: metrics in runs' log.jsonl against training FLOPs (model.forward_flops) and tokens."""
    names, rows, about, logged = settings.metrics.split(","), [], {}, set()
    for run, folder in named_folders(settings.checkpoint).items():
        lines = [flat(line) for line in read_log(folder)]
        if not any("flops" in line for line in lines):
            raise ValueError(f"{folder / 'log.jsonl'}: not there, or not the log of a training run")
        rows += [dict(run=run, **row) for row in scaling_rows(lines, names)]
        about[run] = dict(folder=str(folder))
        logged.update(*lines)
    for name in names:
        flops = [row["flops"] for row in rows if row["metric"] == name]
        if not flops:
            raise ValueError(f"--metrics: no run has logged {name!r}; did you mean {nearest(name, sorted(logged))}?")
        if not any(flops):
            raise ValueError(f"--metrics: {name} was only logged before the first step")
    save("scaling", settings, rows, models=about, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

COMMANDS = dict(segmentation=segmentation, weights=weights, dimension=dimension, overlap=overlap, scaling=scaling)


def save(command, settings, table, **results):
    """Write OUT/command.csv with the rows of table (dicts with the same keys), .json with the results, and .png."""
    from tools import figures  # matplotlib takes a second to import
    path = Path(settings.out) / command
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    results = dict(command=command, settings=vars(settings), **results)
    Path(f"{path}.json").write_text(json.dumps(results, indent=1, default=lambda array: array.tolist()))
    figures.draw(f"{path}.json")
    print(f"written to {path}.png, .csv, .json")


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        configure(DEFAULTS, ["--help"])
    if argv[0] not in COMMANDS:
        raise SystemExit(f"{argv[0]}: no such command; write one of {', '.join(COMMANDS)}")
    settings = SimpleNamespace(**configure(DEFAULTS, argv[1:])[0])
    check(settings)
    first = Path(settings.checkpoint.split(",")[0])
    run = first.parent if first.name.startswith("checkpoint-") else first
    settings.out = settings.out or str(run / "analysis")
    settings.device = pick_device(settings.device)
    try:
        COMMANDS[argv[0]](settings)
    except ValueError as error:  # says in one line what is wrong
        raise SystemExit(str(error)) from None


def check(settings):
    """SystemExit for settings that make no sense, before anything is read."""
    if settings.omega_at not in ("read", "predicted"):
        raise SystemExit(f"omega_at={settings.omega_at}: choose read or predicted")
    for key in ("batch_tokens", "utterances", "drawn_units", "words", "points", "batches", "components", "bootstrap"):
        if getattr(settings, key) < 1:
            raise SystemExit(f"{key}={getattr(settings, key)}: give 1 or more")
    if settings.max_rank < 4:
        raise SystemExit(f"max_rank={settings.max_rank}: give 4 or more")
    if settings.scale < 0 or settings.scale & (settings.scale - 1):
        raise SystemExit(f"scale={settings.scale}: give 0 or a power of 2")
    if not 0 < settings.clip <= 1:
        raise SystemExit(f"clip={settings.clip}: give a number above 0, up to 1")
    script = Path(__file__).parent / f"corpora/{settings.corpus}.py"
    if settings.corpus and not (settings.units and script.is_file()):
        raise SystemExit(f"corpus={settings.corpus}, units={settings.units}: give the name of a script in corpora/, and"
                         " a folder of units")


if __name__ == "__main__":
    main(sys.argv[1:])
