"""
The numbers behind Table 3 and Figures 2 to 9 of the paper, from trained models and data.

    python analyze.py segmentation --checkpoint=out/train_tiny      Table 3: word boundaries found with layer weights
    python analyze.py weights      --checkpoint=out/train_tiny      Figures 5, 7, 8, 9: the layer weights omega and phi
    python analyze.py dimension    --checkpoint=out/train_tiny,out/baseline_tiny     Figure 3: intrinsic dimension
    python analyze.py overlap      --checkpoint=out/train_tiny,out/baseline_tiny     Figure 4: subspace overlap
    python analyze.py scaling      --checkpoint=out/train_tiny,out/baseline_tiny     Figures 2, 6: metrics over compute
    python analyze.py lens         --checkpoint=out/train_tiny,out/baseline_tiny     not in the paper: the logit lens

Each command writes a csv, a json and a png to the folder --out. tools/figures.py draws the png from the json alone.
--checkpoint takes folders of runs, whose newest checkpoint is used, and folders of models.

Conventions. Layer 0 is the input to the backbone, and layer L is its last layer, after the final norm. The model reads
the speech EOS and then the units of an utterance. The omega of a unit is taken at the position where the model has just
read that unit, as in Eq. 3. With --omega_at=predicted it is taken one position earlier, where the model predicts the
unit. A peak of omega marks the first unit of a word. The start and the end of an utterance do not count as boundaries.
"""
import csv
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.signal import find_peaks
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from benchmarks.utterances import open_tokenizer, read_utterances
from configurator import configure, nearest
from data import open_source
from evaluate import newest_checkpoint, results_folder
from model import TEXT_ONLY, from_pretrained
from runtime.checkpoint import demo_of, made_with
from runtime.devices import pick_device
from runtime.log import flat, read_log
from runtime.threads import share_cores

checkpoint = "assets/tiny/smoltolk"  # folders of runs or of models, separated by commas
data = ""                       # folder of a paired data set, or of recordings if corpus is set; "": the demo's test
val = ""                        # segmentation: a second one, on which the methods are tuned; "": the demo's val
text = ""                       # dimension: folder of a paired or text data set for the text; default: the same as data
corpus = ""                     # segmentation, weights: the NAME of corpora/NAME.py, to read recordings with true times
units = ""                      # folder of the speech units: needed with corpus, otherwise gives durations of units
out = ""                        # folder for the results; default: the folder "analysis" in the first run
device = "auto"                 # "cuda", "cpu", "mps", or "auto" for the best one available
batch_tokens = 8192             # positions in one forward pass
seed = 1                        # for subsequences, the random baseline, permutations and the bootstrap
utterances = 2000               # segmentation, weights, lens: the number of utterances, if the data holds so many
tolerance = 1                   # segmentation: the largest distance between a hit and a true boundary, in units
tolerance_ms = 40.0             # segmentation: the same in milliseconds
omega_at = "read"               # segmentation, weights: the position of a unit's omega, "read" or "predicted"
utterance = 0                   # weights: the number of the utterance to draw
drawn_units = 120               # weights: the number of its units to draw
words = 20                      # dimension, overlap: words in a subsequence, which its last token represents
points = 10_000                 # dimension, overlap: subsequences in a batch, if the data holds so many
batches = 5                     # dimension, overlap: disjoint batches, for means and deviations
clip = 0.95                     # dimension, overlap: clip each layer at this quantile of its absolute values
max_rank = 2**13                # dimension: the rank of the farthest neighbour
scale = 0                       # dimension: the neighbour rank n, a power of 2, to report; 0: the plateau of the curve
components = 50                 # overlap: the number of principal components
bootstrap = 50                  # overlap, lens: bootstrap samples for the band
permutations = 5                # lens: how many random targets each word gets for comparison
_CLOZE = "topic_cloze/S/accuracy,topic_cloze/T->S/accuracy,topic_cloze/S->T/accuracy"
metrics = f"nll/speech/speech,{_CLOZE}"  # scaling: keys in log.jsonl, those of nested dicts joined by /

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_")}
PROMINENCES = np.arange(1, 16) / 100  # (0, 0.15] in steps of 0.01, Appendix C.2
LARGE = 1 << 24  # words or tokens; from a data set with more, only a sample is taken


# ---------------------------------------------------------------------------------------------------------------------
# models and their states

class Model(NamedTuple):
    name: str
    folder: Path
    net: torch.nn.Module
    speaks: bool  # False for the folder of a text model, whose speech modules have random weights


def run_of(folder):
    """The folder of the run to which a checkpoint belongs. Any other folder is returned unchanged."""
    folder = Path(folder)
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def named_folders(checkpoint):
    """{name: folder} of the folders in --checkpoint, named after their runs or, if runs share a name, by full paths."""
    folders = [Path(folder) for folder in checkpoint.split(",")]
    names = [run_of(folder.resolve()).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.resolve()).strip("/").replace("/", "-") for folder in folders]
    return dict(zip(names, folders))


def open_models(settings, needs=""):
    """A list of the Models in --checkpoint. ValueError if one lacks what a command needs: "speech" or "selector"."""
    models = []
    for name, folder in named_folders(settings.checkpoint).items():
        folder = newest_checkpoint(folder)
        net = from_pretrained(folder).to(settings.device).eval()
        speaks = (folder / "speech.safetensors").exists()
        if needs and not speaks:
            raise ValueError(f"{folder}: a text model; give a model that was trained on speech")
        if needs == "selector" and net.config.layer_pooling != "dynamic":
            raise ValueError(f"{folder}: has no layer selector; give a model with layer_pooling='dynamic'")
        share_cores(net)
        models.append(Model(name, folder, net, speaks))
    return models


def run_in_batches(net, sequences, batch_tokens, layout=None):
    """Yield (indices of sequences, their lengths, Output) for each batch, the longest sequences first.

    sequences: int64 arrays of ids. They are padded on the right, which does not matter to a causal model.
    """
    lengths = np.array([len(ids) for ids in sequences])
    order = np.argsort(-lengths, kind="stable")
    device = next(net.parameters()).device
    while len(order):
        n = max(1, batch_tokens // lengths[order[0]])
        chosen, order = order[:n], order[n:]
        ids = pad_sequence([torch.from_numpy(sequences[i]) for i in chosen], batch_first=True)  # [n, longest]
        with torch.inference_mode():
            output = net(ids.to(device), layout=layout)
        yield chosen, lengths[chosen], output


def last_hidden(net, sequences, batch_tokens, text=False):
    """Hidden states at the last token of each sequence -> float32 [L + 1, n, d]. text: True for text-only sequences."""
    states = np.empty((net.config.num_hidden_layers + 1, len(sequences), net.config.hidden_size), np.float32)
    for chosen, lengths, output in run_in_batches(net, sequences, batch_tokens, TEXT_ONLY if text else None):
        rows, last = torch.arange(len(chosen)), torch.from_numpy(lengths - 1)
        for layer, hidden in enumerate(output.hidden):
            states[layer, chosen] = hidden[rows, last].float().cpu().numpy()
    return states


def spoken(net, utterances):
    """Sequences of ids that the model reads: the speech EOS and then the units of each utterance."""
    return [np.append(net.config.speech_eos, u.units + net.config.vocab_size) for u in utterances]


def layer_weights(net, utterances, batch_tokens, omega_at):
    """omega of each utterance, a list of float32 [units, L]. omega_at: "read" or "predicted"."""
    omega = [None] * len(utterances)
    for chosen, lengths, output in run_in_batches(net, spoken(net, utterances), batch_tokens):
        for i, length, row in zip(chosen, lengths, output.log_omega.exp().cpu().numpy()):
            omega[i] = row[1:length] if omega_at == "read" else row[:length - 1]
    return omega


def bootstrap_counts(rng, n, samples):
    """How often each of n items is drawn in each bootstrap sample, int64 [samples, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=samples)


# ---------------------------------------------------------------------------------------------------------------------
# subsequences of words and their hidden states, for intrinsic dimension and subspace overlap (Appendix C.1)

def word_table(shard, stream, tokenizer):
    """(offsets of the words in a stream of a data set [w + 1], first words of its documents [d + 1]).

    A text set has no word offsets. There a token that starts with a space begins a word.
    """
    if shard.text_words is not None:
        return (shard.text_words if stream == "text" else shard.speech_words), shard.documents
    ids, documents = np.asarray(shard.text[:LARGE]), shard.documents[shard.documents <= LARGE]
    begins_word = np.zeros(tokenizer.vocab_size, bool)
    for i in np.unique(ids):
        begins_word[i] = i == tokenizer.eos or tokenizer.decode_bytes([i])[:1].isspace()
    first = begins_word[ids]
    first[documents[documents < len(ids)]] = True
    offsets = np.append(np.flatnonzero(first), len(ids))
    return offsets, np.searchsorted(offsets, documents)


def subsequences(shards, streams, words, count, seed, tokenizer=None):
    """Up to `count` different random subsequences of `words` words, each from one document and without its EOS.

    Returns {stream: list of int64 arrays of ids as in the shards}. Item i of all streams has the same words.
    """
    tables = [{stream: word_table(shard, stream, tokenizer) for stream in streams} for shard in shards]
    shard_ends = np.cumsum([len(table[streams[0]][0]) - 1 for table in tables])  # in words
    rng, n_words = np.random.default_rng(seed), shard_ends[-1]
    starts = n_words if n_words < LARGE else np.unique(rng.integers(n_words, size=16 * count))
    found = {stream: [] for stream in streams}
    for start in rng.permutation(starts):
        s = int(np.searchsorted(shard_ends, start, side="right"))
        first = start - (shard_ends[s - 1] if s else 0)
        documents = tables[s][streams[0]][1]
        following = np.searchsorted(documents, first, side="right")  # the next document
        if following == len(documents) or first + words > documents[following] - 1:  # the last word is the EOS
            continue
        for stream in streams:
            offsets, tokens = tables[s][stream][0], getattr(shards[s], stream)
            found[stream].append(tokens[offsets[first]:offsets[first + words]].astype(np.int64))
        if len(found[streams[0]]) == count:
            break
    return found


def representations(model, folder, streams, settings):
    """{stream: float32 [L + 1, n, d]}: clipped last-token states of random subsequences. --batches divides n."""
    kind = "interleaved" if "speech" in streams else "text"
    shards, tokenizer = open_source(kind, [folder], *made_with(model.folder)).shards, open_tokenizer(model.folder)
    if shards[0].text_words is None and tokenizer is None:
        raise ValueError(f"{folder}: a text set, whose words cannot be found without {model.folder}/tokenizer.json")
    words, batches = settings.words, settings.batches
    found = subsequences(shards, streams, words, settings.points * batches, settings.seed, tokenizer)
    n = len(found[streams[0]]) // batches * batches
    if n < 3 * batches:
        raise ValueError(f"{folder}: {n} subsequences of {words} words, too few for {batches} batches")
    states = {}
    for stream, sequences in found.items():
        if not all(len(ids) for ids in sequences):
            raise ValueError(f"{folder}: {words} words in a row have no units; set --words higher")
        shift = model.net.config.vocab_size if stream == "speech" else 0
        sequences = [ids + shift for ids in sequences[:n]]
        states[stream] = last_hidden(model.net, sequences, settings.batch_tokens, text=stream == "text")
        for x in states[stream]:  # each layer has outliers of its own size
            limit = np.quantile(np.abs(x), settings.clip)
            np.clip(x, -limit, limit, out=x)
    return states


# ---------------------------------------------------------------------------------------------------------------------
# word segmentation (Appendix C.2)
#
# A segmentation method has one parameter. It is represented by a dict {value of the parameter: boundaries found}.
# Boundaries are indices into the concatenated units of all utterances of a split.

def peaks(signals, values, step=1.0):
    """The method that finds a boundary at each peak whose prominence is at least value * step.

    signals: a list of float [units], one for each utterance. The ends of a signal are never peaks.
    """
    positions, prominences, offset = [], [], 0
    for signal in signals:
        found, properties = find_peaks(signal, prominence=0)
        positions.append(offset + found)
        prominences.append(properties["prominences"])
        offset += len(signal)
    positions, prominences = np.concatenate(positions), np.concatenate(prominences)
    return {value: positions[prominences >= value * step] for value in values.tolist()}


def baselines(utterances, seed):
    """{name: method} without a model: random or regular boundaries and, if times are known, the ends of long units."""
    within = np.concatenate([np.arange(len(u.units)) for u in utterances])  # position of a unit in its utterance
    draws = np.where(within > 0, np.random.default_rng(seed).random(len(within)), 1)  # 1: never a boundary
    methods = {}
    if utterances[0].starts is not None:  # unit-change rate: 1 / duration of the previous unit
        durations = [np.append(0, np.diff(u.starts)[:-1]) for u in utterances]  # in seconds
        methods["unit-change rate, where it falls"] = peaks(durations, np.arange(1, 17), step=0.01)
    methods["random"] = {i / 40: np.flatnonzero(draws < i / 40) for i in range(1, 21)}
    methods["every k units"] = {k: np.flatnonzero((within % k == 0) & (within > 0)) for k in range(1, 21)}
    methods["every unit change"] = {1.0: np.flatnonzero(within > 0)}
    return methods


def find_boundaries(model, utterances, settings):
    """{name: method}: the peaks of each layer's omega, from the last layer to the first, and the baselines."""
    omega = layer_weights(model.net, utterances, settings.batch_tokens, settings.omega_at)
    methods, L = {}, model.net.config.num_hidden_layers
    for layer in range(L, 0, -1):
        name = f"omega of layer {layer}" + (", the last" if layer == L else "")
        methods[name] = peaks([of_utterance[:, layer - 1] for of_utterance in omega], PROMINENCES)
    return methods | baselines(utterances, settings.seed)


def match_nearest(predicted, true, reach):
    """Which positions in two ascending arrays are hits: (bool [predicted], bool [true]).

    A position is a hit if any position in the other array lies within reach (Kreuk et al. 2020). One position can
    therefore match several.
    """
    def has_near(a, b):
        return np.searchsorted(b, a + reach, side="right") > np.searchsorted(b, a - reach)
    return has_near(predicted, true), has_near(true, predicted)


def match_one_to_one(predicted, true, reach):
    """As match_nearest, but each position matches at most one other: the largest matching of pairs within reach.

    From left to right, each position takes the first free partner. This is optimal because all have the same reach.
    """
    hit_predicted, hit_true = np.zeros(len(predicted), bool), np.zeros(len(true), bool)
    candidates, j = true.tolist(), 0
    for i, position in enumerate(predicted.tolist()):
        while j < len(candidates) and candidates[j] < position - reach:
            j += 1
        if j < len(candidates) and candidates[j] <= position + reach:
            hit_predicted[i] = hit_true[j] = True
            j += 1
    return hit_predicted, hit_true


MATCHINGS = {"nearest": match_nearest, "one-to-one": match_one_to_one}


def lay_out(utterances, measure, gap=1000):
    """Lay a list of Utterances end to end on one axis, in "units" or "seconds", with gaps wider than any tolerance.

    Returns positions of all units, positions of the true boundaries, and edges [utterances + 1] in the gaps, float64.
    """
    if measure == "units":
        starts, true = [np.arange(len(u.units) + 1.0) for u in utterances], [u.boundaries() for u in utterances]
    else:
        starts, true = [u.starts for u in utterances], [u.boundary_times() for u in utterances]
    begin = np.cumsum([0, *(s[-1] + gap for s in starts)])
    positions = np.concatenate([s[:-1] + b for s, b in zip(starts, begin)])
    return positions, np.concatenate([t + b for t, b in zip(true, begin)]), begin - gap / 2


def count_hits(boundaries, axis, tolerance, matching):
    """int64 [utterances, 4]: hits among the predicted boundaries, all predicted, hits among the true ones, all true."""
    positions, true, edges = axis
    predicted = positions[boundaries]
    reach = tolerance + 1e-6  # far less than a unit or a millisecond, far more than a rounding error
    hit_predicted, hit_true = MATCHINGS[matching](predicted, true, reach)
    counted = predicted[hit_predicted], predicted, true[hit_true], true
    return np.stack([np.histogram(x, edges)[0] for x in counted], axis=1)


def scores(counts):
    """{name: score in percent} from counts [..., 4] such as those of count_hits.

    The R-value (Räsänen et al. 2009) is 100 for a perfect segmentation. With OS = recall / precision - 1, it is
        R = 1 - (|r1| + |r2|) / 2,   r1 = sqrt((1 - recall)^2 + OS^2),   r2 = (recall - 1 - OS) / sqrt(2)
    """
    hit_predicted, n_predicted, hit_true, n_true = np.moveaxis(np.asarray(counts, float), -1, 0)
    precision, recall = hit_predicted / np.maximum(1, n_predicted), hit_true / np.maximum(1, n_true)
    f1 = 2 * precision * recall / np.maximum(1e-12, precision + recall)
    over = recall / np.maximum(1e-12, precision) - 1  # over-segmentation; -1 without any hit
    r1 = np.sqrt((1 - recall) ** 2 + over ** 2)
    r2 = (-over + recall - 1) / np.sqrt(2)
    r_value = 1 - (np.abs(r1) + np.abs(r2)) / 2
    return dict(precision=100 * precision, recall=100 * recall, f1=100 * f1, r_value=100 * r_value)


def tune_and_score(val, test, tolerance, matching, seed):
    """A row for each method, with its scores on test at the value that has the highest R-value on val.

    val, test: ({name: method}, axis) of the two splits. Methods that only one of them has are left out.
    """
    (val_methods, val_axis), (test_methods, test_axis), rows = val, test, []
    for name in [name for name in val_methods if name in test_methods]:
        curve = {}  # {value: R-value on val}
        for value, boundaries in val_methods[name].items():
            counts = count_hits(boundaries, val_axis, tolerance, matching)
            curve[value] = float(scores(counts.sum(0))["r_value"])
        best = max(curve, key=curve.get)
        counts = count_hits(test_methods[name][best], test_axis, tolerance, matching)
        total = {key: float(score) for key, score in scores(counts.sum(0)).items()}
        resampled = bootstrap_counts(np.random.default_rng(seed), len(counts), 200) @ counts  # [200, 4]
        error = float(scores(resampled)["r_value"].std())
        rows.append(dict(method=name, setting=float(best), **total, r_value_stderr=error,
                         predicted=int(counts[:, 1].sum()), true=int(counts[:, 3].sum()),
                         settings=list(curve), validation=list(curve.values())))
    return rows


def segmentation(settings):
    """Table 3, with methods that need no model for comparison."""
    rows, models = [], {}
    for model in open_models(settings, needs="selector"):
        val, test = (read_utterances(folder, model, settings) for folder in (settings.val, settings.data))
        val_methods, test_methods = (find_boundaries(model, utterances, settings) for utterances in (val, test))
        timed = val[0].starts is not None and test[0].starts is not None
        cases = [("units", settings.tolerance, f"{settings.tolerance:g} units")]
        if timed:
            cases.append(("seconds", settings.tolerance_ms / 1000, f"{settings.tolerance_ms:g} ms"))
        for (measure, tolerance, within), matching in itertools.product(cases, MATCHINGS):
            splits = (val_methods, lay_out(val, measure)), (test_methods, lay_out(test, measure))
            for row in tune_and_score(*splits, tolerance, matching, settings.seed):
                name = model.name if row["method"].startswith("omega") else ""
                if name or not models:  # the other methods are the same for all models
                    rows.append(dict(model=name, within=within, matching=matching, **row))
        times = "true" if settings.corpus else "estimated: mean duration of each unit"
        models[model.name] = dict(checkpoint=str(model.folder), utterances=len(test), validation_utterances=len(val),
                                  times=timed and times)
    print(f"{'model':20}{'method':32}{'within':>8}{'matching':>12}  setting  precision  recall    F1  R-value")
    for row in rows:
        if not row["model"] or "the last" in row["method"]:
            print(f"{row['model']:20}{row['method']:32}{row['within']:>8}{row['matching']:>12}{row['setting']:9.3g}"
                  f"{row['precision']:11.1f}{row['recall']:8.1f}{row['f1']:6.1f}{row['r_value']:9.1f}"
                  f" ± {row['r_value_stderr']:.1f}")
    return rows, dict(models=models, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# layer weights

def weights(settings):
    """omega along one utterance, phi, and the distribution of omega over layers (Figures 5, 7, 8, 9)."""
    rows, models = [], {}
    for model in open_models(settings, needs="selector"):
        utterances = read_utterances(settings.data, model, settings)
        if not 0 <= settings.utterance < len(utterances):
            raise ValueError(f"--utterance={settings.utterance}: {settings.data} has 0 to {len(utterances) - 1}")
        omega = layer_weights(model.net, utterances, settings.batch_tokens, settings.omega_at)
        utterance, drawn = utterances[settings.utterance], omega[settings.utterance]  # drawn: [units, L]
        boundaries = utterance.boundaries()
        for position, unit in enumerate(utterance.units):
            word = utterance.words[np.searchsorted(utterance.offsets, position, side="right") - 1]
            for layer, weight in enumerate(drawn[position], start=1):
                rows.append(dict(model=model.name, position=position, unit=int(unit),
                                 boundary=int(position in boundaries), word=word, layer=layer, omega=float(weight)))
        models[model.name] = dict(
            checkpoint=str(model.folder), phi=model.net.phi.detach().softmax(0).cpu().numpy(),
            **summarise_weights(utterances, omega),
            utterance=dict(words=utterance.words, offsets=utterance.offsets, omega=drawn[:settings.drawn_units]))
    return rows, dict(models=models)


def summarise_weights(utterances, omega):
    """Statistics of omega over all units, as a dict. omega: a list of float [units, L]."""
    everywhere = np.concatenate(omega)  # [units of all utterances, L]
    means, errors = {}, {}
    for shift in range(-4, 5):  # in units, from the first unit of a word
        values = []
        for utterance, of_utterance in zip(utterances, omega):
            positions = utterance.boundaries() + shift
            positions = positions[(positions >= 0) & (positions < len(of_utterance))]
            values.append(of_utterance[positions, -1])
        values = np.concatenate(values)
        means[shift], errors[shift] = float(values.mean()), float(values.std() / len(values) ** 0.5)
    return dict(omega_mean=everywhere.mean(0), units=len(everywhere),
                omega_quantiles={q: np.quantile(everywhere, q, axis=0) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
                entropy=-float((everywhere * np.log(everywhere + 1e-30)).sum(1).mean()),  # in nats
                last_layer_around_boundaries=means, last_layer_around_boundaries_stderr=errors)


# ---------------------------------------------------------------------------------------------------------------------
# intrinsic dimension: GRIDE (Denti et al. 2022), as in dadapy

@torch.inference_mode()
def neighbour_distances(x, ranks, device="cpu", at_once=1 << 24):
    """Distances of each point in x [N, D] to its neighbours of the given ranks (1: the nearest) -> float64 [N, ranks].

    They are computed in float32. If the nearest neighbour of a point is much closer than the centre of all points,
    rounding matters, and they are computed again in float64. at_once: the number of distances in memory at a time.
    """
    ranks = torch.as_tensor(ranks, device=device)
    exact = torch.as_tensor(x, device=device).double()
    exact = exact - exact.mean(0)
    norms, single = exact.square().sum(1), exact.float()  # [N], [N, D]

    def squares_of(rows, points):
        """Squared distances |a - b|^2 = |b|^2 - 2ab + |a|^2 of points a in `rows` to their neighbours b."""
        squares = torch.addmm(norms.to(points)[None], points[rows], points.T, alpha=-2)  # [rows, N], without |a|^2
        squares[torch.arange(len(rows), device=device), rows] = -torch.inf  # a point is its own neighbour of rank 0
        if squares.is_cuda:
            squares = squares.sort(dim=1).values
        else:
            squares.numpy().sort(axis=1)  # in place; on a CPU many times faster than torch's sort
        return (squares[:, ranks] + norms[rows, None].to(points)).double()  # [rows, ranks]

    block, found = max(1, at_once // len(exact)), []
    for rows in torch.arange(len(exact), device=device).split(block):
        squares = squares_of(rows, single)
        close = (squares[:, 0] < norms[rows] / 256).nonzero()[:, 0]
        for part in close.split(max(1, block // 2)):
            squares[part] = squares_of(rows[part], exact)
        found.append(squares)
    return torch.cat(found).clamp(min=1e-30).sqrt().cpu().numpy()


def gride(x, max_rank=2**13, device="cpu"):
    """Intrinsic dimension of the points x [N, D] at the scales n = 1, 2, 4 .. max_rank / 2.

    Returns (curves, distinct). curves float64 [3, scales] holds the dimension (inf if above 1000), its standard error,
    and the mean distance to neighbours n and 2n. Equal points count once. distinct is the number of different points,
    and 2n stays below it. With fewer than 3 of them, as can happen in layer 0 of text, curves is nan [3, 1]. ValueError
    for values that are not finite.
    """
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise ValueError(f"points {x.shape} hold values that are not finite")
    x = np.unique(x, axis=0)
    if len(x) < 3:
        return np.full((3, 1), np.nan), len(x)
    scales = int(np.log2(min(max_rank, len(x) - 1)))
    r = neighbour_distances(x, 2 ** np.arange(scales + 1), device)  # [N, scales + 1]
    ids, errors = np.array([gride_at(r[:, i + 1] / r[:, i], 2**i) for i in range(scales)]).T
    return np.stack([ids, errors, (r[:, :-1] + r[:, 1:]).mean(0) / 2]), len(x)


def gride_at(mu, n):
    """(dimension d, its standard error) from mu [N] = r_2n / r_n, the ratios of the distances to neighbours 2n and n.

    With n1 = n and n2 = 2n, d is where the derivative of the log-likelihood, which falls with d, is zero:
        (N - 1) / d + (n2 - n1 - 1) sum ln(mu) / (1 - mu^-d) - (n2 - 1) sum ln(mu) = 0
    As in dadapy, far outliers of mu are left out.
    """
    mu = np.where(mu == 1, 1 + 10 * np.finfo(float).eps, mu)
    q50, q95 = np.quantile(mu, [0.5, 0.95])
    kept = mu[mu < 20 * (q95 - q50) + q50]
    log_kept = np.log(kept if len(kept) > 1 else mu)

    def slope(d):  # -expm1 is 1 - mu^-d without a loss of digits
        return ((len(log_kept) - 1) / d + (n - 1) * (log_kept / -np.expm1(-d * log_kept)).sum()
                - (2 * n - 1) * log_kept.sum())

    if slope(1e3) > 0:
        return np.inf, np.nan
    if slope(1e-3) < 0:
        return 0.0, np.nan
    d, log = brentq(slope, 1e-3, 1e3, xtol=1e-9), np.log(mu)
    curvature = len(mu) / d**2 + (n - 1) * ((log / np.expm1(-d * log)) ** 2 * np.exp(-d * log)).sum()
    return d, curvature ** -0.5


def plateau(ids, distinct):
    """Index of the scale where the curve of ids over n = 1, 2, 4 .. is flattest, compared with the scales next to it.

    Scales with 2n above a quarter of the points are left out, because the edge of the data distorts them. 0 if fewer
    than three scales remain, or if all are undefined.
    """
    logs = np.log([d for i, d in enumerate(ids) if 2 * 2**i <= distinct / 4])
    roughness = np.maximum(np.abs(logs[1:-1] - logs[:-2]), np.abs(logs[2:] - logs[1:-1]))
    return 1 + int(np.nanargmin(roughness)) if np.isfinite(roughness).any() else 0


def dimension_rows(batches, settings):
    """A row for each scale: means and deviations over the batches of a layer's points, a list of [N, D]."""
    found = [gride(x, settings.max_rank, "cuda" if settings.device == "cuda" else "cpu") for x in batches]
    fewest, size = min(distinct for _, distinct in found), min(curves.shape[1] for curves, _ in found)
    curves = np.stack([curves[:, :size] for curves, _ in found])  # [batches, 3, scales]
    ids, errors, distances = curves.mean(0)
    deviations = curves[:, 0].std(0)
    chosen = min(size - 1, int(np.log2(settings.scale))) if settings.scale else plateau(ids, fewest)
    return [dict(n=2**i, distance=distances[i], dimension=ids[i], deviation=deviations[i], error=errors[i],
                 chosen=int(i == chosen), distinct=fewest) for i in range(size)]


def dimension(settings):
    """Figure 3: GRIDE of text and of speech in each layer, at all scales."""
    rows, models = [], {}
    for model in open_models(settings):
        models[model.name] = dict(checkpoint=str(model.folder))
        folders = dict(text=settings.text or settings.data, speech=settings.data)
        for stream in ("text", "speech") if model.speaks else ("text",):
            states, chosen = representations(model, folders[stream], (stream,), settings)[stream], []
            for layer, x in enumerate(tqdm(states, desc=stream, disable=None)):
                of_layer = dimension_rows(np.split(x, settings.batches), settings)
                rows += [dict(model=model.name, modality=stream, layer=layer, **row) for row in of_layer]
                chosen += [row["dimension"] for row in of_layer if row["chosen"]]
            n = states.shape[1] // settings.batches
            models[model.name][stream] = dict(points=n)
            print(f"{model.name}, {stream}, {settings.batches} batches of {n}: dimension of layers 0 to L:",
                  *(f"{value:.1f}" for value in chosen))
    return rows, dict(models=models, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def explained(points, k, counts=None):
    """How much of the variance of one set of points lies in the span of the top k principal components of another.

    points: {name: [n, d] tensor}, each centred on its own mean. counts [n]: how often each point counts.
    Returns {(set with the variance, set with the components): share in 0..1}. ValueError if a set has no variance.
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
    """A row for each pair of modalities in a layer. points: {stream: [n, d] tensor}; draws int64 [bootstrap, n]."""
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
    rows, models, rng = [], {}, np.random.default_rng(settings.seed)
    for model in open_models(settings, needs="speech"):
        states = representations(model, settings.data, ("text", "speech"), settings)
        n = states["text"].shape[1]
        draws = torch.from_numpy(bootstrap_counts(rng, n, settings.bootstrap))
        for layer in tqdm(range(len(states["text"])), desc=model.name, disable=None):
            points = {stream: torch.from_numpy(x[layer]).to(settings.device) for stream, x in states.items()}
            rows += [dict(model=model.name, layer=layer, **row) for row in overlap_rows(points, draws, settings)]
        models[model.name] = dict(checkpoint=str(model.folder))
        for a, b in (("speech", "text"), ("text", "speech")):
            shares = [100 * row["share"] for row in rows
                      if (row["model"], row["variance_of"], row["components_of"]) == (model.name, a, b)]
            print(f"{model.name}: % of {a} variance in {b}'s top {settings.components}, layers 0 to L:",
                  *(f"{share:.1f}" for share in shares))
    return rows, dict(models=models, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# scaling

def scaling(settings):
    """Figures 2 and 6: metrics in the log.jsonl of runs against training FLOPs (model.forward_flops) and tokens."""
    rows, models, logged = [], {}, set()
    for run, folder in named_folders(settings.checkpoint).items():
        lines = [flat(line) for line in read_log(folder)]
        training = [line for line in lines if "flops" in line]
        if not training:
            raise ValueError(f"{folder / 'log.jsonl'}: not there, or not the log of a training run")
        spent = {key: [0, *(line[key] for line in training)] for key in ("step", "tokens", "flops")}
        for line, name in itertools.product(lines, settings.metrics.split(",")):
            if name in line:  # lines of evaluation have no tokens and FLOPs, so these are interpolated
                tokens, flops = (np.interp(line["step"], spent["step"], spent[key]) for key in ("tokens", "flops"))
                rows.append(dict(run=run, metric=name, step=line["step"], value=line[name], tokens=float(tokens),
                                 flops=float(flops)))
        models[run] = dict(folder=str(folder))
        logged.update(*lines)
    for name in settings.metrics.split(","):
        flops = [row["flops"] for row in rows if row["metric"] == name]
        if not flops:
            raise ValueError(f"--metrics: no run has logged {name!r}; did you mean {nearest(name, sorted(logged))}?")
        if not any(flops):
            raise ValueError(f"--metrics: {name} was only logged before the first step")
    return rows, dict(models=models, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# logit lens (nostalgebraist 2020): which words the text head finds in the hidden states of speech

TARGETS = {"this word": slice(0, 1), "word before": slice(1, 2), "word after": slice(2, 3),
           "permutation": slice(3, None)}


class SpokenWords(NamedTuple):
    utterance: np.ndarray  # int64 [n]: the index of each word's utterance
    position: np.ndarray   # int64 [n]: the position of its last unit, in a sequence that starts with the speech EOS
    targets: np.ndarray    # int64 [n, 3 + permutations]: first text tokens, with columns as in TARGETS; -1: left out
    left_out: dict         # how many words and targets are left out, and why


def spoken_words(utterances, permutations, seed):
    """All words that have units, and the targets that are looked for at the last unit of each -> SpokenWords.

    The permutations draw the targets of other words. A target that equals the word's own first token is left out.
    """
    tables = []
    for i, u in enumerate(utterances):
        tokens = np.concatenate([[-1], u.first_tokens, [-1]])  # there is no word before the first and after the last
        table = np.stack([np.full(len(u.words), i), u.offsets[1:], tokens[1:-1], tokens[:-2], tokens[2:]], axis=1)
        tables.append(table[np.diff(u.offsets) > 0])
    table, rng = np.concatenate(tables), np.random.default_rng(seed)
    drawn = [rng.permutation(table[:, 2]) for _ in range(permutations)]
    targets = np.column_stack([table[:, 2:], *drawn])
    is_same = targets == targets[:, :1]
    left_out = {"words without units": sum(len(u.words) for u in utterances) - len(table)}
    for name, columns in list(TARGETS.items())[1:]:
        left_out[name] = dict(none=int((targets[:, columns] < 0).sum()), same_token=int(is_same[:, columns].sum()))
    targets[:, 1:][is_same[:, 1:]] = -1
    return SpokenWords(table[:, 0], table[:, 1], targets, left_out)


@torch.inference_mode()
def lens_ranks(net, utterances, words, batch_tokens):
    """The ranks (1: the first; equal logits share the last place) and ln p of words.targets in all layers.

    Returns float32 [2, L + 1, n, targets]. Values of targets that are left out have no meaning.
    """
    L, device = net.config.num_hidden_layers, next(net.parameters()).device
    found = np.empty((2, L + 1, *words.targets.shape), np.float32)
    at_once = max(1, (1 << 24) // net.config.vocab_size)  # the logits of a whole batch could take gigabytes
    for chosen, _, output in run_in_batches(net, spoken(net, utterances), batch_tokens):
        row = np.full(len(utterances), -1)
        row[chosen] = np.arange(len(chosen))
        for part in torch.from_numpy(np.flatnonzero(row[words.utterance] >= 0)).split(at_once):
            rows, positions = row[words.utterance[part]], words.position[part]
            targets = torch.from_numpy(words.targets[part]).clamp(min=0).to(device)
            for layer, hidden in enumerate(output.hidden):
                x = hidden[rows, positions]                                       # [part, d]
                logits = net.text_logits(x if layer == L else net.model.norm(x))  # [part, V]
                wanted = logits.gather(1, targets)                                # [part, targets]
                ranks = torch.stack([(logits >= column[:, None]).sum(1) for column in wanted.T], 1)
                log_p = wanted - logits.logsumexp(1, keepdim=True)
                found[:, layer, part] = torch.stack([ranks, log_p]).cpu().numpy()
    return found


def lens_rows(words, ranks, log_p, counts):
    """A row for each of TARGETS in one layer. ranks, log_p [n, targets]; counts int64 [bootstrap, utterances]."""
    rows, mrr, counts = [], {}, np.vstack([np.ones_like(counts[0]), counts])  # the first sample is the data itself
    for name, columns in TARGETS.items():
        kept = words.targets[:, columns] >= 0
        ids, utterance = words.targets[:, columns][kept], words.utterance[kept.nonzero()[0]]
        r, p = (x[:, columns][kept].astype(float) for x in (ranks, log_p))
        weight = 1 / np.bincount(ids)[ids]  # each different token counts once
        total, norm = (counts @ np.bincount(utterance, x, counts.shape[1]) for x in (weight / r, weight))
        mrr[name] = total / norm  # of each sample
        rows.append(dict(target=name, targets=len(r), tokens=len(np.unique(ids)), mrr=mrr[name][0],
                         mrr_stderr=mrr[name][1:].std(), mrr_over_words=(1 / r).mean(), median_rank=np.median(r),
                         top_1=100 * (r <= 1).mean(), top_10=100 * (r <= 10).mean(), log_p=p.mean()))
    for row in rows:  # both terms of the difference come from the same samples
        gain = mrr[row["target"]] - mrr["permutation"]
        row |= dict(gain=gain[0], gain_stderr=gain[1:].std())
    return rows


def lens(settings):
    """How well spoken words can be read off as text in each layer. This is not in the paper.

    The model reads utterances as speech alone. At the last unit of each word, the final norm and the text head turn
    each layer's hidden state into a ranking of the text vocabulary. We look up the first text token of this word and,
    for comparison, those of the word before, the word after, and random words of the data. A model that only knows how
    frequent words are ranks all four alike. One that only knows the topic ranks the first three alike.

    The score is the mean reciprocal rank (MRR): 1 if a token is always first, 0.1 if it is always tenth. Unlike a mean
    rank or percentile, it does not depend on how far down a token is that is not found anyway. Each different token
    counts once in it. Otherwise "the" alone could decide the result. All other columns are over words.
    """
    rows, models = [], {}
    for model in open_models(settings, needs="speech"):
        utterances = read_utterances(settings.data, model, settings)
        if utterances[0].first_tokens is None:
            raise ValueError(f"--corpus={settings.corpus}: lens needs the text tokens of a paired data set")
        words = spoken_words(utterances, settings.permutations, settings.seed)
        found = lens_ranks(model.net, utterances, words, settings.batch_tokens)
        counts = bootstrap_counts(np.random.default_rng(settings.seed), len(utterances), settings.bootstrap)
        for layer, (ranks, log_p) in enumerate(zip(*found)):
            rows += [dict(model=model.name, layer=layer, **row) for row in lens_rows(words, ranks, log_p, counts)]
        models[model.name] = dict(checkpoint=str(model.folder), utterances=len(utterances), words=len(words.position),
                                  left_out=words.left_out)
        for name in TARGETS:
            print(f"{model.name}, {name}: MRR in layers 0 to L:", *(f"{row['mrr']:.4f} ± {row['mrr_stderr']:.4f}"
                  for row in rows if (row["model"], row["target"]) == (model.name, name)))
    return rows, dict(models=models, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# the command line. A command takes the settings and returns (rows of the csv file, results for the json file).

COMMANDS = dict(segmentation=segmentation, weights=weights, dimension=dimension, overlap=overlap, scaling=scaling,
                lens=lens)


def save(command, settings, rows, results):
    """Write COMMAND.csv with the rows (dicts with the same keys; lists are left out), COMMAND.json and COMMAND.png."""
    from tools import figures  # here, because matplotlib is slow to import
    path = Path(settings.out) / command
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    with open(f"{path}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    results = dict(command=command, settings=vars(settings), **results)
    Path(f"{path}.json").write_text(json.dumps(results, indent=1, default=lambda array: array.tolist()))
    figures.draw(f"{path}.json")
    print(f"written to {path}.png, .csv, .json")


def check(settings):
    """SystemExit for invalid settings, before any model is read."""
    rules = dict(omega_at=(settings.omega_at in ("read", "predicted"), "read or predicted"),
                 scale=(settings.scale >= 0 and settings.scale.bit_count() < 2, "0 or a power of 2"),
                 max_rank=(settings.max_rank >= 4, "4 or more"),
                 clip=(0 < settings.clip <= 1, "a number above 0, up to 1"))
    for key in ("batch_tokens", "utterances", "drawn_units", "words", "points", "batches", "components", "bootstrap",
                "permutations"):
        rules[key] = getattr(settings, key) >= 1, "1 or more"
    for key, (holds, remedy) in rules.items():
        if not holds:
            raise SystemExit(f"{key}={getattr(settings, key)}: give {remedy}")
    script = Path(__file__).parent / f"corpora/{settings.corpus}.py"
    if settings.corpus and not (settings.units and script.is_file()):
        raise SystemExit(f"corpus={settings.corpus}, units={settings.units}: give the name of a script in corpora/ and"
                         " a folder of units")


def main(argv):
    command, *options = argv or ["--help"]
    if command not in (*COMMANDS, "-h", "--help"):
        raise SystemExit(f"{command}: no such command; write one of {', '.join(COMMANDS)}")
    settings = SimpleNamespace(**configure(DEFAULTS, options if command in COMMANDS else ["--help"])[0])
    check(settings)
    first = settings.checkpoint.split(",")[0]
    settings.out = settings.out or str(Path(results_folder(first) or run_of(first)) / "analysis")
    settings.device = pick_device(settings.device)
    if command != "scaling":  # which reads logs alone
        demo = demo_of(newest_checkpoint(first))
        settings.data, settings.val = settings.data or f"{demo}/test", settings.val or f"{demo}/val"
    try:
        save(command, settings, *COMMANDS[command](settings))
    except ValueError as error:  # its message names the file and the fault
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
