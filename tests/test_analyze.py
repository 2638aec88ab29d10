"""analyze.py and tools/figures.py: estimators against brute force, dadapy and known answers; each command; pictures."""
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import analyze
from benchmarks import utterances as reading
from data import open_source, uniform
from model import Config, SmolTolk, forward_flops, make_layout, save_pretrained
from runtime.datasets import open_set, write_set
from runtime.files import whole_folder
from runtime.tokenizer import Tokenizer
from speech.audio import read_audio
from speech.mel import save_mel_units
from speech.units import load_units, vocabulary_hash
from tools import figures

# ---------------------------------------------------------------------------------------------------------------------
# segmentation

@pytest.mark.parametrize("precision, recall, f1, r_value", [
    (30.3, 20.3, 24.5, 40.5), (50.5, 46.7, 48.4, 56.8), (37.6, 37.2, 37.4, 46.8), (33.3, 29.4, 31.2, 43.4),  # Table 3
    (100, 100, 100, 100), (0, 0, 0, 0)])
def test_scores_are_those_of_table_3_and_known_at_the_ends(precision, recall, f1, r_value):
    found = analyze.scores([precision * 10, 1000, recall * 10, 1000])
    assert [float(found[key]) for key in ("precision", "recall")] == pytest.approx([precision, recall])
    assert float(found["f1"]) == pytest.approx(f1, abs=0.2)
    assert float(found["r_value"]) == pytest.approx(r_value if recall else 100 - 50 * 2 ** 0.5, abs=0.15)


positions = st.lists(st.integers(0, 40), max_size=15, unique=True).map(sorted)


@given(positions, positions, st.integers(0, 4))
def test_matchings_agree_with_brute_force(predicted, true, tolerance):
    """One-to-one matching against scipy's maximum matching of a bipartite graph."""
    p, t, reach = np.array(predicted, float), np.array(true, float), tolerance + 1e-6
    near = np.abs(p[:, None] - t) <= tolerance
    hit_p, hit_t = analyze.match_nearest(p, t, reach)
    assert hit_p.tolist() == near.any(1).tolist() and hit_t.tolist() == near.any(0).tolist()
    hit_p, hit_t = analyze.match_one_to_one(p, t, reach)
    matched = maximum_bipartite_matching(csr_matrix(near), perm_type="column") if near.size else np.array([-1])
    assert hit_p.sum() == hit_t.sum() == (matched >= 0).sum()


def spoken(words, durations=None):
    """An Utterance of words with so many units each, whose units last so many frames of 40 ms, or one each."""
    offsets = np.cumsum([0, *words])
    starts = np.append(0, np.cumsum(durations or [1] * offsets[-1])) * 0.04
    return reading.Utterance(np.zeros(offsets[-1], np.int64), ["w"] * len(words), offsets, starts, None)


word_lengths = st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda lengths: sum(lengths) > 1)


@given(st.lists(word_lengths, min_size=1, max_size=4), st.sampled_from([("units", 1), ("seconds", 0.04)]),
       st.integers(0, 3), st.sampled_from(list(analyze.MATCHINGS)), st.integers(0, 9))
def test_hits_on_the_common_axis_are_those_of_single_utterances(corpus, measure_and_unit, tolerance, matching, seed):
    utterances, (measure, unit) = [spoken(words) for words in corpus], measure_and_unit
    rng = np.random.default_rng(seed)
    chosen = [rng.random(len(u.units)) < 0.4 for u in utterances]
    axis = analyze.lay_out(utterances, measure)
    counts = analyze.count_hits(np.flatnonzero(np.concatenate(chosen)), axis, tolerance * unit, matching)
    for u, predicted, count in zip(utterances, chosen, counts):
        hit_p, hit_t = analyze.MATCHINGS[matching](np.flatnonzero(predicted), u.boundaries(), tolerance + 1e-6)
        assert count.tolist() == [hit_p.sum(), predicted.sum(), hit_t.sum(), len(u.boundaries())]


def test_boundaries_leave_out_the_ends_and_words_without_units():
    u = spoken([0, 2, 0, 3, 1, 0])
    assert u.boundaries().tolist() == [2, 5]
    assert u.boundary_times() == pytest.approx([0.08, 0.2])
    timed = u._replace(ends=np.array([0.0, 0.07, 0.07, 0.21, 0.24, 0.24]))
    assert timed.boundary_times() == pytest.approx([0.07, 0.21])


def test_planted_peaks_are_found_exactly_and_baselines_do_not_find_them():
    """A high peak at each boundary among low peaks, which tuning must learn to leave out."""
    rng, splits = np.random.default_rng(0), []
    for _ in range(2):
        utterances = [spoken(rng.integers(2, 9, size=12)) for _ in range(20)]
        signals = [0.02 * rng.random(len(u.units)) for u in utterances]
        for u, signal in zip(utterances, signals):
            signal[u.boundaries()] += 0.12
        methods = dict(planted=analyze.peaks(signals, analyze.PROMINENCES)) | analyze.baselines(utterances, 0)
        splits.append((utterances, methods))
    for measure, matching in (("units", "one-to-one"), ("units", "nearest"), ("seconds", "one-to-one")):
        val, test = ((methods, analyze.lay_out(utterances, measure)) for utterances, methods in splits)
        rows = {row["method"]: row for row in analyze.tune_and_score(val, test, 0, matching, seed=1)}
        planted = rows.pop("planted")
        assert [planted[key] for key in ("precision", "recall", "f1", "r_value")] == [100] * 4
        assert 0.02 <= planted["setting"] <= 0.1 and planted["r_value_stderr"] == 0
        assert planted["true"] == sum(len(u.boundaries()) for u in utterances)
        assert len(rows) == 4 and max(row["r_value"] for row in rows.values()) < 60


def test_baselines_predict_what_their_names_say():
    """Boundaries in two utterances of 7 and 4 units, none of them at a first unit."""
    methods = analyze.baselines([spoken([3, 4], [1, 1, 4, 1, 1, 1, 1]), spoken([2, 2])], seed=0)
    assert methods["every k units"][3].tolist() == [3, 6, 10]
    assert methods["every unit change"][1].tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert methods["unit-change rate, where it falls"][8].tolist() == [3]  # after the unit of four frames
    few, many = (set(methods["random"][rate].tolist()) for rate in (0.1, 0.5))
    assert few < many < set(methods["every unit change"][1].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# intrinsic dimension

def golden_points():
    """600 points: three coordinates, curled up in seven dimensions and a constant one, and noise."""
    i = np.arange(600)[:, None]
    a, b, c = uniform(1, 2, i, np.arange(3)).T
    x = np.stack([np.cos(3 * a), np.sin(3 * a), np.cos(2 * b) * c, np.sin(2 * b) * c, a * b, c ** 2, b - a, 0 * a], 1)
    return x + 0.01 * uniform(1, 3, i, np.arange(8))


# dadapy 0.3.4 (numpy 1.26.4): Data(coordinates=golden_points()).return_id_scaling_gride(range_max=2**13)
GOLDEN = [[2.918676, 2.876958, 2.775669, 2.771078, 2.701982, 2.621691, 2.480366, 2.208272, 1.521755],
          [0.119154, 0.084657, 0.057912, 0.040862, 0.028154, 0.019314, 0.012919, 0.008135, 0.003964],
          [0.154338, 0.204999, 0.267581, 0.347615, 0.450824, 0.586475, 0.77, 1.037199, 1.543041]]


def test_gride_equals_dadapy():
    """Dimensions, errors and distances at all scales, dimensions at four scales, and dadapy's own test set."""
    curves, distinct = analyze.gride(golden_points())
    np.testing.assert_allclose(curves, GOLDEN, rtol=1e-4)
    assert distinct == 600
    np.testing.assert_allclose(analyze.gride(golden_points(), max_rank=16)[0][0], GOLDEN[0][:4], rtol=1e-4)
    path = Path(__file__).resolve().parents[2] / "shared/data/2gaussians_in_2d.npy"
    if path.exists():
        expected = [2.0007, 2.0321, 1.9118, 2.0005, 1.6747, 0.7208]
        assert analyze.gride(np.load(path))[0][0].tolist() == pytest.approx(expected, abs=1e-3)


@given(st.integers(4, 60), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1e4]), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_neighbours_agree_with_brute_force(n, d, seed, shift, at_once):
    """In blocks of any size, near and far from the origin."""
    x = np.random.default_rng(seed).standard_normal((n, d)) + shift
    ranks = [r for r in (1, 2, 4, 8, 16, 32) if r < n]
    found = analyze.neighbour_distances(x, ranks, at_once=at_once)
    np.testing.assert_allclose(found, np.sort(cdist(x, x), 1)[:, ranks], rtol=1e-4)


def test_distances_of_close_neighbours_are_exact():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 300))
    x[250:] = x[:250] + 1e-5 * rng.standard_normal((250, 300))  # rounding to float32 would hide these distances
    np.testing.assert_allclose(analyze.neighbour_distances(x, [1, 2]), np.sort(cdist(x, x), 1)[:, [1, 2]], rtol=2e-5)


def test_dimension_at_the_smallest_scale_has_a_closed_form():
    mu = 1 + np.random.default_rng(0).pareto(1, 4000)
    kept = mu[mu < 20 * (np.quantile(mu, 0.95) - np.median(mu)) + np.median(mu)]
    assert 4 < len(mu) - len(kept) < 100  # there are far outliers
    assert analyze.gride_at(mu, 1)[0] == pytest.approx((len(kept) - 1) / np.log(kept).sum(), rel=1e-6)


def test_dimension_of_a_sphere_with_repeated_points_and_constant_coordinates():
    x = np.random.default_rng(0).standard_normal((3000, 6))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    (ids, _, distances), _ = analyze.gride(x, 64)
    assert ids[:3] == pytest.approx([5] * 3, rel=0.1)  # curvature lowers it
    assert np.all(np.diff(distances) > 0)
    padded = np.pad(np.concatenate([x, x[:500]]), [(0, 0), (0, 3)], constant_values=7.0)
    curves, distinct = analyze.gride(padded, 64)
    assert distinct == 3000 and curves[0] == pytest.approx(ids, rel=1e-3)


@pytest.mark.parametrize("ids, distinct, index", [
    ([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], 10_000, 8), ([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], 3000, 4),  # 2n <= 750
    ([5, 4], 10_000, 0), ([np.nan] * 5, 10_000, 0)])
def test_plateau_is_the_flattest_place_within_a_quarter_of_the_points(ids, distinct, index):
    assert analyze.plateau(ids, distinct) == index


def test_gride_of_degenerate_points():
    for x, expected in ((np.ones((50, 4)), 1), (np.array([[0.0], [1.0], [1.0]]), 2)):  # fewer than 3 distinct points
        curves, distinct = analyze.gride(x)
        assert np.isnan(curves).all() and curves.shape == (3, 1) and distinct == expected
    with pytest.raises(ValueError, match="not finite"):
        analyze.gride(np.array([[0.0], [1.0], [np.nan]]))
    assert analyze.gride(np.random.default_rng(0).random((5, 2)))[0].shape == (3, 2)  # neighbours 1, 2 and 4
    angle = 2 * np.pi * np.arange(64) / 64
    [d], [error], _ = analyze.gride(np.stack([np.cos(angle), np.sin(angle)], 1), 2)[0]  # neighbours equally far away
    assert d == np.inf and np.isnan(error)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def cloud(seed, n=300, d=12):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d)) * np.geomspace(1, 0.05, d) @ rng.standard_normal((d, d)) + 3)


def test_overlap_agrees_with_svd_also_when_points_are_repeated():
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 300))
    for weights, times in ((None, torch.ones_like(counts)), (counts, counts)):
        points = dict(x=cloud(0), y=cloud(1))
        found = analyze.explained(points, 4, weights)
        repeated = {name: x.repeat_interleave(times, 0) for name, x in points.items()}
        centred = {name: x - x.mean(0) for name, x in repeated.items()}
        for a, b in found:
            basis = torch.linalg.svd(centred[b], full_matrices=False)[2][:4]
            expected = (centred[a] @ basis.T).square().sum() / centred[a].square().sum()
            assert found[a, b] == pytest.approx(float(expected), rel=1e-9)
        assert found["x", "x"] > found["x", "y"]  # no other subspace holds more


def test_overlap_of_orthogonal_and_of_constant_data():
    x, y, zero = cloud(0), cloud(1), torch.zeros(300, 12, dtype=torch.float64)
    apart = analyze.explained(dict(x=torch.cat([x, zero], 1), y=torch.cat([zero, y], 1)), 12)
    assert apart["x", "y"] == pytest.approx(0, abs=1e-9) and apart["x", "x"] == pytest.approx(1)
    with pytest.raises(ValueError, match="y: 300 points without variance"):
        analyze.explained(dict(x=x, y=zero), 4)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs: training, its MFU and the scaling pictures share one count

SHAPE = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, n_units=10, max_position_embeddings=64)
BASELINE = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)


@pytest.mark.parametrize("overrides", [{}, BASELINE, dict(layer_pooling="fixed"), dict(num_key_value_heads=4)], ids=str)
@pytest.mark.parametrize("speaks", [True, False])
def test_forward_flops_are_what_torch_counts(overrides, speaks):
    config = Config(**{**SHAPE, **overrides})
    rows, T = 5, 24
    ids = np.random.default_rng(0).integers(0, 61 if speaks else 50, (rows, T + 1))  # text, units and speech EOS
    ids = torch.from_numpy(ids)
    layout = make_layout(ids[:, :-1], ids[:, 1:], config)
    if not speaks:
        layout = layout._replace(speech=None)
    # torch cannot count the CPU's attention kernel, but it can count its plain matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        out = SmolTolk(config)(ids[:, :-1], ids[:, 1:], layout)
    counted = sum(forward_flops(config, rows, T, speaks, len(out.text_nll), len(out.speech_nll)))
    # torch counts attention over all T x T pairs, forward_flops the causal T (T + 1) / 2
    layers = config.num_hidden_layers + speaks * (config.input_adapter_layers + config.output_adapter_layers)
    assert counter.get_total_flops() == counted + layers * rows * 2 * config.hidden_size * (2 * T * T - T * (T + 1))


# ---------------------------------------------------------------------------------------------------------------------
# from checkpoints and data

@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_folder):
    """(folder of a small random model with the demo's vocabularies, folder of the demo corpus)."""
    folder = tmp_path_factory.mktemp("runs") / "small" / "checkpoint-00000007"
    meta = json.loads((demo_folder / "paired/meta.json").read_text())
    torch.manual_seed(0)
    net = SmolTolk(Config(**{**SHAPE, "max_position_embeddings": 256, "vocab_size": meta["text"]["vocab_size"],
                             "n_units": meta["speech"]["n_units"], "initializer_range": 0.3}))
    for parameter in net.layer_selector.parameters():  # a new selector gives all layers the same weight
        torch.nn.init.normal_(parameter)
    with whole_folder(folder) as new:
        save_pretrained(net, new)
        for name in ("tokenizer.json", "units/units.json"):
            (new / Path(name).name).write_bytes((demo_folder / name).read_bytes())
    return folder, demo_folder


def run(world, command, out, **more):
    """Run a command and return (rows of the csv, the json)."""
    values = dict(checkpoint=world[0], data=world[1] / "test", val=world[1] / "val", out=out, device="cpu")
    analyze.main([command, *(f"--{k}={v}" for k, v in (values | more).items())])
    assert (out / f"{command}.png").read_bytes()[:4] == b"\x89PNG"
    with open(out / f"{command}.csv", newline="") as f:
        return list(csv.DictReader(f)), json.loads((out / f"{command}.json").read_text())


def opened(world, **more):
    """The model, and settings."""
    c = SimpleNamespace(**{**analyze.DEFAULTS, "checkpoint": str(world[0]), "device": "cpu", **more})
    return analyze.open_models(c)[0], c


@torch.inference_mode()
def test_states_and_weights_are_those_of_single_forward_passes(world):
    model, c = opened(world)
    assert model.name == "small" and model.speaks
    [shard] = open_source("interleaved", [world[1] / "test"]).shards
    found = analyze.subsequences([shard], ("text", "speech"), 4, 30, seed=1)
    V = model.net.config.vocab_size
    for stream, shift in (("text", 0), ("speech", V)):
        sequences = [ids + shift for ids in found[stream]]
        states = analyze.last_hidden(model.net, sequences, 64, text=stream == "text")
        for i in (0, 11, 29):
            hidden = model.net(torch.from_numpy(sequences[i])[None]).hidden
            np.testing.assert_allclose(states[:, i], torch.stack([h[0, -1] for h in hidden]).numpy(), atol=1e-5)
    u = analyze.read_utterances(world[1] / "test", model, c)[3]
    ids = torch.from_numpy(np.append(model.net.config.speech_eos, u.units + V))[None]
    omega = model.net(ids).log_omega[0].exp().numpy()
    for omega_at, expected in (("read", omega[1:]), ("predicted", omega[:-1])):  # row j has just read unit j - 1
        [found] = analyze.layer_weights(model.net, [u], 64, omega_at)
        assert np.std(found) > 0.01
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_utterances_of_a_paired_set(world):
    """Units, words and estimated times are those of the data set; a long document is cut between words."""
    model, c = opened(world)
    whole = analyze.read_utterances(world[1] / "test", model, c)
    text, units, _, speech_words = open_set(world[1] / "test").document(2)
    assert whole[2].units.tolist() == units[:-1].tolist()
    assert whole[2].offsets.tolist() == speech_words[:-1].tolist()
    assert " ".join(whole[2].words) == Tokenizer(world[0] / "tokenizer.json").decode(text[:-1])
    durations = json.loads((world[0] / "units.json").read_text())["durations"]
    assert np.diff(whole[2].starts) == pytest.approx([durations[i] / 25 for i in units[:-1]])
    model.net.config.max_position_embeddings = 41
    pieces = list(reading.read_paired(world[1] / "test", model, c))
    assert max(len(u.units) for u in pieces) <= 40 and len(pieces) > len(whole)
    assert np.concatenate([u.units for u in pieces]).tolist() == np.concatenate([u.units for u in whole]).tolist()
    assert sum((u.words for u in pieces), []) == sum((u.words for u in whole), [])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_subsequences_are_different_and_stay_within_documents(tmp_path_factory, lengths, words, count, seed):
    """Word i is written as 1 or 2 tokens i and spoken as 0 to 2 units i, so that ids tell where a slice comes from."""
    def written(word):
        return [word] * (1 + word % 2)

    def heard(word):
        return [word] * (word % 3)

    folder, word, documents, possible = tmp_path_factory.mktemp("sets") / "paired", 1, [], []
    for n in lengths:
        ids = range(word, word + n)
        documents.append(([written(i) for i in ids], [heard(i) for i in ids]))
        possible += [ids[i:i + words] for i in range(n - words + 1)]
        word += n
    write_set(folder, "paired", documents, SimpleNamespace(vocab_size=100, eos=0, hash="t"),
              dict(n_units=99, rate=25, hash="u"))
    shard = open_set(folder)
    found = analyze.subsequences([shard, shard], ("text", "speech"), words, count, seed)
    wanted = 2 * [(sum(map(written, ids), []), sum(map(heard, ids), [])) for ids in possible]
    assert len(found["text"]) == min(count, len(wanted))
    for text, speech in zip(found["text"], found["speech"]):
        wanted.remove((text.tolist(), speech.tolist()))  # ValueError if one comes too often


def test_words_of_a_text_set_begin_with_a_space(world, tmp_path):
    tokenizer = Tokenizer(world[0] / "tokenizer.json")
    texts = ["The moon rose. Tom saw it", "A cat sat", "on"]
    write_set(tmp_path / "text", "text", map(tokenizer.encode, texts), tokenizer)
    shard = open_set(tmp_path / "text")
    found = analyze.subsequences([shard], ("text",), 3, 99, seed=0, tokenizer=tokenizer)["text"]
    assert sorted(tokenizer.decode(ids).strip() for ids in found) == [
        "A cat sat", "The moon rose.", "Tom saw it", "moon rose. Tom", "rose. Tom saw"]


def test_segmentation(world, tmp_path):
    """The rows of all cases, and the scores of a baseline that can be counted by hand."""
    rows, results = run(world, "segmentation", tmp_path)
    cases = {(row["within"], row["matching"]) for row in rows}
    assert cases == {(w, m) for w in ("1 units", "40 ms") for m in ("nearest", "one-to-one")}
    test = open_set(world[1] / "test")
    documents = [test.document(i) for i in range(test.meta["documents"])]
    true = sum(len(set(s[1:-2].tolist()) - {0, len(u) - 1}) for _, u, _, s in documents)
    predicted = sum(len(u) - 2 for _, u, _, _ in documents)
    assert {int(row["true"]) for row in rows} == {true}
    [every] = figures.select(rows, method="every unit change", matching="one-to-one", within="1 units")
    assert int(every["predicted"]) == predicted
    assert [float(every["precision"]), float(every["recall"])] == pytest.approx([100 * true / predicted, 100], abs=1e-3)
    assert results["models"]["small"]["times"].startswith("estimated")


def test_weights(world, tmp_path):
    """omega along an utterance, and its statistics, computed a second time from layer_weights."""
    rows, results = run(world, "weights", tmp_path, utterance=1)
    _, units, _, offsets = open_set(world[1] / "test").document(1)
    assert [int(row["unit"]) for row in rows[::3]] == units[:-1].tolist()
    boundaries = [int(row["position"]) for row in rows[::3] if row["boundary"] == "1"]
    assert boundaries == sorted(set(offsets[1:-2].tolist()) - {0})
    omega = np.array([float(row["omega"]) for row in rows]).reshape(-1, 3)
    np.testing.assert_allclose(omega.sum(1), 1, atol=1e-4)
    found = results["models"]["small"]
    assert sum(found["phi"]) == pytest.approx(1)
    np.testing.assert_allclose(found["utterance"]["omega"], omega[:120], atol=1e-5)  # the units that are drawn
    assert found["utterance"]["offsets"] == offsets[:-1].tolist()
    model, c = opened(world)
    utterances = analyze.read_utterances(world[1] / "test", model, c)
    omega = analyze.layer_weights(model.net, utterances, 256, "read")
    values = []  # of the last layer, three units after the first unit of a word
    for u, of_utterance in zip(utterances, omega):
        values += [of_utterance[i + 3, -1] for i in u.boundaries() if i + 3 < len(of_utterance)]
    assert found["last_layer_around_boundaries"]["3"] == pytest.approx(np.mean(values), rel=1e-4)
    error = np.std(values) / len(values) ** 0.5
    assert found["last_layer_around_boundaries_stderr"]["3"] == pytest.approx(error, rel=1e-3)


def test_dimension_and_overlap(world, tmp_path):
    """The rows of the csv are those of gride and explained on the same states, which are clipped layer by layer."""
    few = dict(points=60, batches=2, words=8)
    rows, _ = run(world, "dimension", tmp_path, **few)
    assert {(row["modality"], row["layer"]) for row in rows} == {(s, i) for s in ("text", "speech") for i in "0123"}
    for stream in ("text", "speech"):  # one scale is chosen in each layer
        assert len(figures.select(rows, modality=stream, chosen="1")) == 4
    model, c = opened(world, **few)
    states = analyze.representations(model, world[1] / "test", ("text", "speech"), c)
    loose = analyze.representations(model, world[1] / "test", ("text", "speech"), opened(world, **few, clip=1.0)[1])
    limit = np.quantile(np.abs(loose["speech"][2]), 0.95)
    np.testing.assert_array_equal(states["speech"][2], np.clip(loose["speech"][2], -limit, limit))
    expected = np.mean([analyze.gride(half)[0][0] for half in np.split(states["speech"][2], 2)], 0)
    found = figures.column(figures.select(rows, modality="speech", layer="2"), "dimension")
    assert found == pytest.approx(expected, rel=1e-4)

    rows, _ = run(world, "overlap", tmp_path, **few, components=5, bootstrap=8)
    shares = analyze.explained({s: torch.from_numpy(x[3]) for s, x in states.items()}, 5)
    for (a, b), share in shares.items():
        [row] = figures.select(rows, layer="3", variance_of=a, components_of=b)
        assert float(row["share"]) == pytest.approx(share, rel=1e-4)
        assert float(row["low"]) <= float(row["share"]) <= float(row["high"])
        assert float(row["random_subspace"]) == pytest.approx(5 / 32)


def test_scaling(world, tmp_path):
    """Tokens and FLOPs of an evaluation between two logged training steps are interpolated."""
    for name, factor in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        lines = [dict(step=s, tokens=100 * s, flops=1000 * s * factor, text_nll=5 / s) for s in (10, 20, 30)]
        lines += [dict(step=0, entropy=1.0), dict(step=15, nll=dict(speech=dict(speech=2.5)))]
        lines.sort(key=lambda line: line["step"])
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    two = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    rows, _ = run(world, "scaling", tmp_path, checkpoint=two, metrics="nll/speech/speech,text_nll")
    held_out = figures.select(rows, metric="nll/speech/speech")
    assert [(row["run"], float(row["tokens"]), float(row["flops"])) for row in held_out] == [
        ("one", 1500, 15000), ("two", 1500, 30000)]
    assert len(rows) == 8
    (tmp_path / "scaling.png").unlink()
    figures.main([str(tmp_path / "scaling.json")])
    assert (tmp_path / "scaling.png").exists()
    for name, message in (("text_nl", "no run has logged 'text_nl'; did you mean text_nll"),
                          ("entropy", "entropy was only logged before the first step")):
        with pytest.raises(SystemExit, match=message):
            run(world, "scaling", tmp_path, checkpoint=two, metrics=name)


def test_recordings_in_true_time(world, tmp_path):
    """Through corpora/manifest.py: units come from the sound, times of words from the manifest."""
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
    for split in ("val", "test"):
        (tmp_path / split).mkdir()
        lines = [dict(audio="missing.wav", text="gone", words=[["gone", 0, 1]])]
        for i in range(2):
            (tmp_path / split / f"{i}.wav").write_bytes((world[1] / f"wavs/{i}.wav").read_bytes())
            words = (world[1] / f"wavs/{i}.txt").read_text().split()[:8]
            times = [[w, 0.3 * k, 0.3 * k + 0.25] for k, w in enumerate(words)]
            lines.append(dict(audio=f"{i}.wav", start=0, end=2.4, text=" ".join(words), words=times))
        (tmp_path / split / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, c = opened(world, corpus="manifest", units=str(world[1] / "units"))
    u = analyze.read_utterances(tmp_path / "test", model, c)[1]
    vocabulary = load_units(world[1] / "units")
    [(ids, frame_start)] = vocabulary.encode([read_audio(tmp_path / "test/1.wav", 0, 2.4)])
    assert u.units.tolist() == ids.tolist() and u.starts[:-1].tolist() == (frame_start / 25).tolist()
    assert u.boundary_times() == pytest.approx(0.3 * np.arange(7) + 0.25)
    (tmp_path / "wrong").mkdir()
    codebook = vocabulary._replace(centroids=vocabulary.centroids + 1)
    save_mel_units(tmp_path / "wrong", codebook._replace(hash=vocabulary_hash(codebook.centroids)))
    with pytest.raises(ValueError, match="wrong: not the units that .* was trained with"):
        analyze.read_utterances(tmp_path / "test", *opened(world, corpus="manifest", units=str(tmp_path / "wrong")))
    rows, results = run((world[0], tmp_path), "segmentation", tmp_path / "out", corpus="manifest",
                        units=world[1] / "units", tolerance_ms=60)
    assert results["models"]["small"]["times"] == "true"
    assert {int(row["true"]) for row in figures.select(rows, within="60 ms")} == {14}


@pytest.mark.parametrize("arguments, message", [
    (["segment"], "segment: no such command; write one of segmentation"),
    (["weights", "--corpus=foo", "--units=x"], "corpus=foo, units=x: give the name of a script"),
    (["weights", "--corpus=timit"], "corpus=timit, units=: give the name"),
    (["dimension", "--max_rank=1"], "max_rank=1: give 4 or more"),
    (["dimension", "--scale=6"], "scale=6: give 0 or a power of 2"),
    (["dimension", "--clip=95"], "clip=95.0: give a number above 0, up to 1"),
    (["weights", "--utterance=999"], "--utterance=999: .* has 0 to"),
    (["weights", "--omega_at=here"], "omega_at=here: give read or predicted"),
    (["overlap", "--words=500"], "0 subsequences of 500 words, too few for 5 batches"),
    (["dimension", "--batches=0"], "batches=0: give 1 or more"),
    (["scaling"], "log.jsonl: not there")])
def test_errors_are_one_line(world, tmp_path, arguments, message):
    more = [f"--checkpoint={world[0]}", f"--data={world[1] / 'test'}", f"--out={tmp_path}", "--device=cpu"]
    with pytest.raises(SystemExit, match=message) as caught:
        analyze.main([*arguments, *more])
    assert "\n" not in str(caught.value)


def test_a_baseline_has_no_selector_and_a_text_model_no_speech(world, tmp_path):
    save_pretrained(SmolTolk(Config(**{**SHAPE, **BASELINE})), tmp_path / "model")
    with pytest.raises(SystemExit, match="model: has no layer selector"):
        analyze.main(["weights", f"--checkpoint={tmp_path / 'model'}", "--device=cpu"])
    (tmp_path / "model/speech.safetensors").unlink()
    for command in ("weights", "overlap"):
        with pytest.raises(SystemExit, match="model: a text model; give a model that was trained on speech"):
            analyze.main([command, f"--checkpoint={tmp_path / 'model'}", "--device=cpu"])


# ---------------------------------------------------------------------------------------------------------------------
# figures

def curves(axes):
    """{label: (x, y, colour)} of the lines in a picture."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_color())
            for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_pictures_of_several_models(world, tmp_path):
    """Each model has its own colour, and its own panels. A text model has no curve for speech."""
    for name in ("text_model", "copy"):
        shutil.copytree(world[0], tmp_path / name)
    (tmp_path / "text_model/speech.safetensors").unlink()
    out, small = tmp_path / "out", world[0]
    two = f"{tmp_path / 'text_model'},{small}"
    rows, results = run(world, "dimension", out, checkpoint=two, points=30, batches=2, words=8)
    main, *scales = figures.dimension(results).axes
    assert {name: colour for name, (_, _, colour) in curves(main).items()} == {
        "text_model, text": "#0072B2", "small, text": "#D55E00", "small, speech": "#D55E00"}
    assert len(scales) == 3
    drawn = figures.select(rows, model="small", modality="text", layer="3")
    x, y, _ = curves(scales[1])["layer 3"]
    assert x == figures.column(drawn, "n").tolist()
    assert y == pytest.approx(figures.column(drawn, "dimension").tolist(), rel=1e-4)

    rows, results = run(world, "weights", out, checkpoint=f"{small},{tmp_path / 'copy'}", utterances=6)
    assert [row["model"] for row in rows] == ["small"] * (len(rows) // 2) + ["copy"] * (len(rows) // 2)
    assert results["models"]["small"]["phi"] == results["models"]["copy"]["phi"]
    titles = [axes.get_title() for axes in figures.weights(results).axes]
    assert [title.split(":")[0] for title in titles if "along an utterance" in title] == ["small", "copy"]


def test_the_picture_leaves_out_layers_of_mostly_equal_points():
    rows = [dict(model="a", modality="text", layer=layer, n=2**i, dimension=5.0 + layer, deviation=0.1,
                 chosen=int(i == 1), distinct=distinct)
            for layer, distinct in enumerate([49, 50, 100]) for i in range(3)]
    figure = figures.dimension(dict(models=dict(a=dict(text=dict(points=100))), rows=rows))
    _, y, _ = curves(figure.axes[0])["a, text"]
    assert np.isnan(y[0]) and y[1:] == [6, 7]


def test_loss_curves(tmp_path):
    """Also from the log of a run that was killed while it wrote a line."""
    lines = [dict(step=5, stage="text", text_nll=4.0, speech_nll=None), dict(step=9, stage="stage1", changed={}),
             dict(step=10, stage="stage1", text_nll=3.0, speech_nll=5.0),
             dict(step=10, stage="stage1", nll=dict(speech=dict(speech=2.5), interleaved=dict(text=3.5)),
                  topic_cloze={"S->T": dict(accuracy=61.0)})]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "st')
    figures.main([str(tmp_path / "log.jsonl")])
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    training, held_out, cloze = figures.losses(lines).axes
    assert curves(training) == {"text targets": ([5, 10], [4, 3], "#0072B2"), "speech targets": ([10], [5], "#D55E00")}
    assert curves(held_out) == {"speech sequences": ([10], [2.5], "#D55E00"),
                                "text in interleaved sequences": ([10], [3.5], "#0072B2")}
    assert curves(cloze) == {"S->T": ([10], [61], "#009E73")}
    assert [(text.get_position()[0], text.get_text()) for text in cloze.texts] == [(5, "text"), (9, "stage1")]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "{", "a.json: cannot be read"), ("a.json", "[]", "a.json: not a json of analyze.py"),
    ("a.json", '{"command": "train"}', "not a json of analyze.py"), ("log.jsonl", None, "log.jsonl: no such file"),
    ("log.jsonl", "{\n", "log.jsonl: a line in it is not json"), ("a.csv", "", "tools.figures FILE")])
def test_what_cannot_be_drawn(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        figures.main([str(tmp_path / name)])
