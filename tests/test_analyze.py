"""analyze.py and tools/figures.py: estimators against brute force, dadapy's values and known answers; each command."""
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

@pytest.mark.parametrize("precision, recall, f1, r_value", [  # Table 3
    (30.3, 20.3, 24.5, 40.5), (50.5, 46.7, 48.4, 56.8), (37.6, 37.2, 37.4, 46.8), (33.3, 29.4, 31.2, 43.4)])
def test_r_value_of_table_3(precision, recall, f1, r_value):
    assert 100 * analyze.r_value(precision / 100, recall / 100) == pytest.approx(r_value, abs=0.15)
    found = analyze.scores([precision * 10, 1000, recall * 10, 1000])
    assert [float(found[k]) for k in ("precision", "recall")] == pytest.approx([precision, recall])
    assert float(found["f1"]) == pytest.approx(f1, abs=0.2)


def test_r_value_at_the_ends():
    assert analyze.r_value(1, 1) == 1
    assert analyze.r_value(0.1, 1) < 0  # ten times too many: over-segmentation is punished
    assert np.isfinite(analyze.r_value(0, 0))


positions = st.lists(st.integers(0, 40), max_size=15, unique=True).map(sorted)


@given(positions, positions, st.integers(0, 4), st.sampled_from([1, 0.04]))
def test_matching_against_brute_force(predicted, true, tolerance, unit):
    p, t = np.array(predicted, float) * unit, np.array(true, float) * unit
    near = [[abs(a - b) <= tolerance for b in true] for a in predicted]
    hit_p, hit_t = analyze.match(p, t, tolerance * unit)
    assert hit_p.tolist() == [any(row) for row in near]
    assert hit_t.tolist() == [any(row[j] for row in near) for j in range(len(true))]
    hit_p, hit_t = analyze.match(p, t, tolerance * unit, one_to_one=True)
    largest = 0
    if predicted and true:
        largest = int((maximum_bipartite_matching(csr_matrix(np.array(near, int)), perm_type="column") >= 0).sum())
    assert hit_p.sum() == hit_t.sum() == largest


def spoken(words, durations=None):
    """An Utterance of words with so many units each."""
    offsets = np.cumsum([0, *words])
    lasted = np.ones(offsets[-1]) if durations is None else np.asarray(durations)
    return reading.Utterance(np.zeros(offsets[-1], np.int64), ["w"] * len(words), offsets,
                             np.append(0, np.cumsum(lasted)) * 0.04, None)


word_lengths = st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda lengths: sum(lengths) > 1)


@given(st.lists(word_lengths, min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_hits_of_a_corpus_are_those_of_its_utterances(corpus, tolerance, one_to_one, seed):
    utterances = [spoken(words) for words in corpus]
    axis, rng = analyze.lay_out(utterances, "units"), np.random.default_rng(seed)
    chosen = [rng.random(len(u.units)) < 0.4 for u in utterances]
    counts = analyze.count_hits(axis.position[np.concatenate(chosen)], axis, tolerance, one_to_one)
    for u, its, count in zip(utterances, chosen, counts):
        hit_p, hit_t = analyze.match(np.flatnonzero(its), u.boundaries(), tolerance, one_to_one)
        assert count.tolist() == [hit_p.sum(), its.sum(), hit_t.sum(), len(u.boundaries())]


def test_boundaries_leave_out_the_ends_and_words_without_units():
    u = spoken([0, 2, 0, 3, 1, 0])
    assert u.boundaries().tolist() == [2, 5]
    assert u.boundary_times() == pytest.approx([0.08, 0.2])
    timed = u._replace(ends=np.array([0.0, 0.07, 0.07, 0.21, 0.24, 0.24]))
    assert timed.boundary_times() == pytest.approx([0.07, 0.21])


def test_planted_peaks_are_found_exactly_and_chance_is_not():
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(2):
        utterances = [spoken(rng.integers(2, 9, size=12)) for _ in range(20)]
        signals = []
        for u in utterances:  # a high peak at each boundary and low ones, which tuning must learn to leave out, between
            signal = 0.02 * rng.random(len(u.units))
            signal[u.boundaries()] += 0.12
            signals.append(signal)
        planted = analyze.peaks(signals, analyze.PROMINENCES)
        splits.append(analyze.Split(utterances, dict(planted=planted) | analyze.baselines(utterances, rng)))
    for measure, one_to_one in (("units", True), ("units", False), ("seconds", True)):
        rows = {row["method"]: row for row in analyze.tune_and_score(*splits, measure, 0, one_to_one, seed=1)}
        planted = rows["planted"]
        assert [planted[k] for k in ("precision", "recall", "f1", "r_value")] == [100] * 4
        assert 0.02 <= planted["setting"] <= 0.1 and planted["r_value_stderr"] == 0
        assert planted["true"] == sum(len(u.boundaries()) for u in splits[1].utterances)
        assert max(row["r_value"] for name, row in rows.items() if name != "planted") < 60


def test_baselines_predict_what_they_say():
    utterances = [spoken([3, 4], [1, 1, 4, 1, 1, 1, 1]), spoken([2, 2])]
    methods, axis = analyze.baselines(utterances, np.random.default_rng(0)), analyze.lay_out(utterances, "units")

    def predicted(name, value):
        return axis.position[methods[name].predict(value)].tolist()

    second = axis.position[7]
    assert predicted("every k units", 3) == [3, 6, second + 3]
    assert predicted("every unit change", 1) == [1, 2, 3, 4, 5, 6, second + 1, second + 2, second + 3]
    assert predicted("unit-change rate, where it falls", 8) == [3]  # after the unit of four frames
    assert predicted("random", 0) == [] and predicted("random", 1.0) == predicted("every unit change", 1)
    assert set(predicted("random", 0.1)) <= set(predicted("random", 0.5))


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


def test_gride_is_dadapys():
    found = analyze.gride(golden_points())
    for ours, theirs in zip(found, GOLDEN):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert found.ranks.tolist() == [2**i for i in range(9)] and found.points == 600
    np.testing.assert_allclose(analyze.gride(golden_points(), max_rank=16).ids, GOLDEN[0][:4], rtol=1e-4)


def test_gride_on_dadapys_own_test_set():
    path = Path(__file__).resolve().parents[2] / "shared/data/2gaussians_in_2d.npy"
    if not path.exists():
        pytest.skip("dadapy's 2gaussians_in_2d.npy is not beside this checkout")
    expected = [2.0007, 2.0321, 1.9118, 2.0005, 1.6747, 0.7208]
    assert analyze.gride(np.load(path)).ids.tolist() == pytest.approx(expected, abs=1e-3)


@given(st.integers(4, 60), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1e4]), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_neighbours_in_blocks_against_brute_force(n, d, seed, shift, at_once):
    x = np.random.default_rng(seed).standard_normal((n, d)) + shift  # far from the origin, in blocks of any size
    ranks = [r for r in (1, 2, 4, 8, 16, 32) if r < n]
    found = analyze.neighbour_distances(x, ranks, at_once=at_once)
    np.testing.assert_allclose(found, np.sort(cdist(x, x), 1)[:, ranks], rtol=1e-4)


def test_neighbours_that_are_close_are_measured_exactly():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 300))
    x[250:] = x[:250] + 1e-5 * rng.standard_normal((250, 300))  # in float32 these distances would be noise
    np.testing.assert_allclose(analyze.neighbour_distances(x, [1, 2]), np.sort(cdist(x, x), 1)[:, [1, 2]], rtol=2e-5)


def test_closed_form_at_the_smallest_scale():
    mu = 1 + np.random.default_rng(0).pareto(1, 4000)
    kept = mu[mu < 20 * (np.quantile(mu, 0.95) - np.median(mu)) + np.median(mu)]
    assert 4 < len(mu) - len(kept) < 100  # far outliers
    assert analyze.gride_at(mu, 1)[0] == pytest.approx((len(kept) - 1) / np.log(kept).sum(), rel=1e-6)


def swiss_roll(rng, n):
    t, y = 1.5 * np.pi * (1 + 2 * rng.random(n)), 21 * rng.random(n)
    return np.stack([t * np.cos(t), y, t * np.sin(t)], 1), 2


def sphere(rng, n, d=5):
    x = rng.standard_normal((n, d + 1))
    return np.pad(x / np.linalg.norm(x, axis=1, keepdims=True), [(0, 0), (0, 20)]), d


def subspace(rng, n, d=8):
    return rng.standard_normal((n, d)) @ np.linalg.qr(rng.standard_normal((64, d)))[0].T, d


@pytest.mark.parametrize("manifold", [swiss_roll, sphere, subspace])
def test_known_manifolds(manifold):
    x, d = manifold(np.random.default_rng(0), 3000)
    found = analyze.gride(x, 64)
    assert found.ids[:3] == pytest.approx([d] * 3, rel=0.1 if d > 2 else 0.06)  # edges and curvature pull it down
    assert np.all(np.diff(found.scales) > 0)
    assert analyze.gride(np.pad(x, [(0, 0), (0, 3)], constant_values=7.0), 64).ids == pytest.approx(found.ids, rel=1e-3)
    doubled = np.concatenate([x, x[:500]])  # equal points count once
    assert analyze.gride(doubled, 64).points == 3000 and analyze.gride(doubled, 64).ids == pytest.approx(found.ids)


def test_noise_is_seen_at_small_scales_and_the_plane_at_the_plateau():
    rng = np.random.default_rng(0)
    x = np.pad(rng.random((4000, 2)), [(0, 0), (0, 18)]) + 0.003 * rng.standard_normal((4000, 20))
    found = analyze.gride(x)
    assert found.ids[0] > 3
    assert found.ids[analyze.plateau(found.ids, found.ranks, found.points)] == pytest.approx(2, abs=0.3)


def test_plateau():
    ranks = 2 ** np.arange(10)
    assert analyze.plateau([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], ranks, 10_000) == 8  # flat at the end, if it may count
    assert analyze.plateau([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], ranks, 3000) == 4  # 2n <= 750
    assert analyze.plateau([5, 4], ranks[:2], 10_000) == analyze.plateau([np.nan] * 5, ranks[:5], 10_000) == 0


def test_degenerate_points():
    for x, distinct in ((np.ones((50, 4)), 1), (np.array([[0.0], [1.0], [1.0]]), 2)):  # fewer than 3 different points
        found = analyze.gride(x)
        assert np.isnan([found.ids, found.errors, found.scales]).all() and found.points == distinct
    with pytest.raises(ValueError, match="not finite"):
        analyze.gride(np.array([[0.0], [1.0], [np.nan]]))
    assert len(analyze.gride(np.random.default_rng(0).random((5, 2)), 2**13).ids) == 2  # neighbours 1, 2 and 4
    angle = 2 * np.pi * np.arange(64) / 64
    ring = analyze.gride(np.stack([np.cos(angle), np.sin(angle)], 1), 2)  # both neighbours equally far
    assert ring.ids[0] == np.inf and np.isnan(ring.errors[0])


def test_clipping():
    x = np.random.default_rng(0).standard_normal((400, 5)).astype(np.float32)
    x[0, 0] = -1e6
    clipped = analyze.clip_outliers(x, 0.95)
    limit = np.quantile(np.abs(x), 0.95)
    assert np.array_equal(clipped, np.where(np.abs(x) > limit, np.sign(x) * limit, x).astype(clipped.dtype))
    assert (np.abs(x) > limit).mean() == pytest.approx(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# subspace overlap

def cloud(seed, n=300, d=12):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d)) * np.geomspace(1, 0.05, d) @ rng.standard_normal((d, d)) + 3)


def test_overlap_by_svd():
    x, y = cloud(0), cloud(1)
    found, centred = analyze.explained(dict(x=x, y=y), 4), {"x": x - x.mean(0), "y": y - y.mean(0)}
    for a in "xy":
        for b in "xy":
            basis = torch.linalg.svd(centred[b], full_matrices=False)[2][:4]
            expected = (centred[a] @ basis.T).square().sum() / centred[a].square().sum()
            assert found[a, b] == pytest.approx(float(expected), rel=1e-9)
    assert found["x", "x"] > found["x", "y"]  # no other subspace holds more


def test_overlap_of_identical_orthogonal_and_rotated_data():
    x, y, zero = cloud(0), cloud(1), torch.zeros(300, 12, dtype=torch.float64)
    same = analyze.explained(dict(x=x, y=x.clone()), 4)
    assert same["x", "y"] == same["y", "x"] == pytest.approx(same["x", "x"])
    apart = analyze.explained(dict(x=torch.cat([x, zero], 1), y=torch.cat([zero, y], 1)), 12)
    assert apart["x", "y"] == pytest.approx(0, abs=1e-9) and apart["x", "x"] == pytest.approx(1)
    turn = torch.linalg.qr(cloud(2, 12))[0]
    assert analyze.explained(dict(x=x @ turn, y=y @ turn), 4) == pytest.approx(analyze.explained(dict(x=x, y=y), 4))
    with pytest.raises(ValueError, match="y: 300 points without variance"):
        analyze.explained(dict(x=x, y=zero), 4)


def test_overlap_with_weights_is_that_of_repeated_points():
    x, y, weights = cloud(0), cloud(1), torch.from_numpy(np.random.default_rng(0).integers(0, 4, 300))
    repeated = {k: v.repeat_interleave(weights, 0) for k, v in dict(x=x, y=y).items()}
    assert analyze.explained(dict(x=x, y=y), 4, weights) == pytest.approx(analyze.explained(repeated, 4))


def test_a_random_subspace_explains_its_share_of_dimensions():
    rng = np.random.default_rng(0)
    shares = [analyze.explained(dict(x=cloud(0), y=torch.from_numpy(rng.standard_normal((30, 12)))), 4)["x", "y"]
              for _ in range(400)]
    assert np.mean(shares) == pytest.approx(4 / 12, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs: the one count that training, its MFU and the scaling pictures share

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
    # torch does not know how to count the CPU's attention kernel, but its plain matrix products
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
    """(folder of a small random model with the demo's vocabularies, the demo corpus)."""
    folder = tmp_path_factory.mktemp("runs") / "small" / "checkpoint-00000007"
    meta = json.loads((demo_folder / "paired/meta.json").read_text())
    torch.manual_seed(0)
    net = SmolTolk(Config(**{**SHAPE, "max_position_embeddings": 256, "vocab_size": meta["text"]["vocab_size"],
                             "n_units": meta["speech"]["n_units"], "initializer_range": 0.3}))
    with whole_folder(folder) as new:
        save_pretrained(net, new)
        for name in ("tokenizer.json", "units/units.json"):
            (new / Path(name).name).write_bytes((demo_folder / name).read_bytes())
    return folder, demo_folder


def run(world, command, out, **more):
    values = dict(checkpoint=world[0], data=world[1] / "test", val=world[1] / "val", out=out, device="cpu")
    analyze.main([command, *(f"--{k}={v}" for k, v in (values | more).items())])
    with open(out / f"{command}.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    path = out / f"{command}.png"
    drawn = path.read_bytes()
    assert drawn[:4] == b"\x89PNG"
    path.unlink()
    figures.main([str(path.with_suffix(".json"))])  # all that the picture shows is in the json
    assert path.read_bytes() == drawn
    return rows, json.loads(path.with_suffix(".json").read_text())


def opened(world, **more):
    c = SimpleNamespace(**{**analyze.DEFAULTS, "checkpoint": str(world[0]), "device": "cpu", **more})
    return analyze.open_models(c)[0], c


@torch.inference_mode()
def test_states_and_weights_are_those_of_single_forward_passes(world):
    model, _ = opened(world)
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
    u = analyze.read_utterances(world[1] / "test", model, opened(world)[1])[3]
    ids = torch.from_numpy(np.append(model.net.config.speech_eos, u.units + V))[None]
    omega = model.net(ids).log_omega[0].exp().numpy()
    [read], [predicted] = (analyze.layer_weights(model.net, [u], 64, at) for at in ("read", "predicted"))
    np.testing.assert_allclose(read, omega[1:], atol=1e-6)  # the state that has read unit j
    np.testing.assert_allclose(predicted, omega[:-1], atol=1e-6)  # the state that predicts unit j


def test_utterances_of_a_paired_set(world):
    model, c = opened(world)
    whole = analyze.read_utterances(world[1] / "test", model, c)
    test = open_set(world[1] / "test")
    text, units, t, s = test.document(2)
    assert whole[2].units.tolist() == units[:-1].tolist() and whole[2].offsets.tolist() == s[:-1].tolist()
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
def test_subsequences(tmp_path_factory, lengths, words, count, seed):
    folder, word, documents = tmp_path_factory.mktemp("sets") / "paired", 1, []
    for n in lengths:  # each word has its own ids: 1 or 2 tokens, 0 to 2 units
        ids = range(word, word + n)
        documents.append(([[i] * (1 + i % 2) for i in ids], [[i] * (i % 3) for i in ids]))
        word += n
    tokenizer = SimpleNamespace(vocab_size=100, eos=0, hash="t")
    write_set(folder, "paired", documents, tokenizer, dict(n_units=99, rate=25, hash="u"))
    shard = open_set(folder)
    found = analyze.subsequences([shard, shard], ("text", "speech"), words, count, seed)
    possible = [list(range(b - n + i, b - n + i + words)) for n, b in zip(lengths, np.cumsum(lengths) + 1)
                for i in range(n - words + 1)]
    heard = [(t.tolist(), s.tolist()) for t, s in zip(found["text"], found["speech"])]
    wanted = 2 * [([i for w in p for i in [w] * (1 + w % 2)], [i for w in p for i in [w] * (w % 3)]) for p in possible]
    assert len(heard) == min(count, len(wanted))
    for pair in heard:
        wanted.remove(pair)  # each at most as often as it is there, so batches are disjoint


def test_words_of_a_text_set_begin_with_a_space(world, tmp_path):
    tokenizer = Tokenizer(world[0] / "tokenizer.json")
    texts = ["The moon rose. Tom saw it", "A cat sat", "on"]
    write_set(tmp_path / "text", "text", map(tokenizer.encode, texts), tokenizer)
    shard = open_set(tmp_path / "text")
    found = analyze.subsequences([shard], ("text",), 3, 99, seed=0, tokenizer=tokenizer)["text"]
    assert sorted(tokenizer.decode(ids).strip() for ids in found) == [
        "A cat sat", "The moon rose.", "Tom saw it", "moon rose. Tom", "rose. Tom saw"]


def test_segmentation(world, tmp_path):
    rows, about = run(world, "segmentation", tmp_path)
    kinds = {(row["within"], row["matching"]) for row in rows}
    assert kinds == {(w, m) for w in ("1 units", "40 ms") for m in ("nearest", "one-to-one")}
    test = open_set(world[1] / "test")
    documents = [test.document(i) for i in range(test.meta["documents"])]
    true = sum(len(set(s[1:-2].tolist()) - {0, len(u) - 1}) for _, u, _, s in documents)
    assert {int(row["true"]) for row in rows} == {true}
    [every] = [row for row in rows if row["method"] == "every unit change" and row["matching"] == "one-to-one"
               and row["within"] == "1 units"]
    predicted = sum(len(u) - 2 for _, u, _, _ in documents)
    assert int(every["predicted"]) == predicted
    assert [float(every["precision"]), float(every["recall"])] == pytest.approx([100 * true / predicted, 100], abs=1e-3)
    assert about["models"]["small"]["times"].startswith("estimated")


def test_weights(world, tmp_path):
    rows, about = run(world, "weights", tmp_path, utterance=1)
    test = open_set(world[1] / "test")
    _, units, _, s = test.document(1)
    assert [int(row["unit"]) for row in rows[::3]] == units[:-1].tolist()
    assert [int(row["position"]) for row in rows[::3] if row["boundary"] == "1"] == sorted(set(s[1:-2].tolist()) - {0})
    omega = np.array([float(row["omega"]) for row in rows]).reshape(-1, 3)
    np.testing.assert_allclose(omega.sum(1), 1, atol=1e-4)
    about = about["models"]["small"]
    assert sum(about["phi"]) == pytest.approx(1)
    np.testing.assert_allclose(about["utterance"]["omega"], omega[:120], atol=1e-5)  # those that are drawn
    assert about["utterance"]["offsets"] == s[:-1].tolist()
    model, c = opened(world)
    utterances = analyze.read_utterances(world[1] / "test", model, c)
    omega = analyze.layer_weights(model.net, utterances, 256, "read")
    for shift in (-2, 0, 3):
        values = [w[i + shift, -1] for u, w in zip(utterances, omega) for i in u.boundaries()
                  if 0 <= i + shift < len(w)]
        assert about["last_layer_around_boundaries"][str(shift)] == pytest.approx(np.mean(values), rel=1e-4)
        error = np.std(values) / len(values) ** 0.5
        assert about["last_layer_around_boundaries_stderr"][str(shift)] == pytest.approx(error, rel=1e-3)


def test_dimension_and_overlap(world, tmp_path):
    rows, _ = run(world, "dimension", tmp_path, points=60, batches=2, words=8)
    assert {(row["modality"], row["layer"]) for row in rows} == {(s, i) for s in ("text", "speech") for i in "0123"}
    for stream in ("text", "speech"):  # one scale is chosen in each layer
        assert sum(int(row["chosen"]) for row in rows if row["modality"] == stream) == 4
    model, c = opened(world, points=60, batches=2, words=8)
    states = analyze.representations(model, world[1] / "test", ("speech",), c)["speech"][2]
    expected = np.mean([analyze.gride(half).ids for half in np.split(states, 2)], 0)
    mine = [float(row["dimension"]) for row in rows if (row["modality"], row["layer"]) == ("speech", "2")]
    assert mine == pytest.approx(expected.tolist(), rel=1e-4)

    rows, about = run(world, "overlap", tmp_path, points=60, batches=2, words=8, components=5, bootstrap=8)
    states = analyze.representations(model, world[1] / "test", ("text", "speech"), c)
    shares = analyze.explained({s: torch.from_numpy(x[3]) for s, x in states.items()}, 5)
    for row in rows:
        if row["layer"] == "3":
            pair = row["variance_of"], row["components_of"]
            assert float(row["share"]) == pytest.approx(shares[pair], rel=1e-4)
        assert float(row["low"]) <= float(row["share"]) <= float(row["high"])
        assert float(row["random_subspace"]) == pytest.approx(5 / 32)


def test_scaling(world, tmp_path):
    for name, factor in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        lines = [dict(step=s, tokens=100 * s, flops=1000 * s * factor, text_nll=5 / s) for s in (10, 20, 30)]
        lines.insert(0, dict(step=0, entropy=1.0))
        lines.insert(3, dict(step=15, nll=dict(speech=dict(speech=2.5))))  # between two logged steps
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = f"--checkpoint={tmp_path / 'one'},{tmp_path / 'two'}"
    analyze.main(["scaling", runs, f"--out={tmp_path}", "--metrics=nll/speech/speech,text_nll"])
    with open(tmp_path / "scaling.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    held = [(row["run"], float(row["tokens"]), float(row["flops"])) for row in rows if row["metric"] != "text_nll"]
    assert held == [("one", 1500, 15000), ("two", 1500, 30000)]
    assert len(rows) == 8
    for name, message in (("text_nl", "no run has logged 'text_nl'; did you mean text_nll"),
                          ("entropy", "entropy was only logged before the first step")):
        with pytest.raises(SystemExit, match=message):
            analyze.main(["scaling", runs, f"--out={tmp_path}", f"--metrics={name}"])


def test_recordings_in_true_time(world, tmp_path):
    """Through corpora/manifest.py: units from the sound, words as the manifest times them."""
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
    lines = []
    for split in ("val", "test"):
        folder = tmp_path / split
        folder.mkdir()
        for i in range(2):
            (folder / f"{i}.wav").write_bytes((world[1] / f"wavs/{i}.wav").read_bytes())
            words = (world[1] / f"wavs/{i}.txt").read_text().split()[:8]
            times = [[w, 0.3 * k, 0.3 * k + 0.25] for k, w in enumerate(words)]
            lines.append(dict(audio=f"{i}.wav", start=0, end=2.4, text=" ".join(words), words=times))
        lines.append(dict(audio="missing.wav", text="gone", words=[["gone", 0, 1]]))
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = []
    model, c = opened(world, corpus="manifest", units=str(world[1] / "units"))
    u = analyze.read_utterances(tmp_path / "test", model, c)[1]
    vocabulary = load_units(world[1] / "units")
    waveform = read_audio(tmp_path / "test/1.wav", 0, 2.4)
    [(ids, frame_start)] = vocabulary.encode([waveform])
    assert u.units.tolist() == ids.tolist() and u.starts[:-1].tolist() == (frame_start / 25).tolist()
    assert u.boundary_times() == pytest.approx(0.3 * np.arange(7) + 0.25)
    (tmp_path / "wrong").mkdir()
    codebook = vocabulary._replace(centroids=vocabulary.centroids + 1)
    save_mel_units(tmp_path / "wrong", codebook._replace(hash=vocabulary_hash(codebook.centroids)))
    with pytest.raises(ValueError, match="wrong: not the units that .* was trained with"):
        analyze.read_utterances(tmp_path / "test", *opened(world, corpus="manifest", units=str(tmp_path / "wrong")))
    rows, about = run((world[0], tmp_path), "segmentation", tmp_path / "out", corpus="manifest",
                      units=world[1] / "units", tolerance_ms=60)
    assert about["models"]["small"]["times"] == "true"
    assert {int(row["true"]) for row in rows if row["within"] == "60 ms"} == {14}


@pytest.mark.parametrize("arguments, message", [
    (["segment"], "segment: no such command; write one of segmentation"),
    (["weights", "--corpus=foo", "--units=x"], "corpus=foo, units=x: give the name of a script"),
    (["weights", "--corpus=timit"], "corpus=timit, units=: give the name"),
    (["dimension", "--max_rank=1"], "max_rank=1: give 4 or more"),
    (["dimension", "--scale=6"], "scale=6: give 0 or a power of 2"),
    (["dimension", "--clip=95"], "clip=95.0: give a number above 0, up to 1"),
    (["weights", "--utterance=999"], "--utterance=999: .* has 0 to"),
    (["weights", "--omega_at=here"], "omega_at=here: choose read or predicted"),
    (["overlap", "--words=500"], "0 subsequences of 500 words, too few for 5 batches"),
    (["dimension", "--batches=0"], "batches=0: give 1 or more"),
    (["scaling"], "log.jsonl: not there")])
def test_errors_are_one_line(world, tmp_path, arguments, message):
    more = [f"--checkpoint={world[0]}", f"--data={world[1] / 'test'}", f"--out={tmp_path}", "--device=cpu"]
    with pytest.raises(SystemExit, match=message) as caught:
        analyze.main([*arguments, *more])
    assert "\n" not in str(caught.value)


def test_a_baseline_or_text_model_has_no_selector(world, tmp_path):
    config = Config(**{**SHAPE, **BASELINE})
    save_pretrained(SmolTolk(config), tmp_path / "model")
    with pytest.raises(SystemExit, match="model: has no trained layer selector"):
        analyze.main(["weights", f"--checkpoint={tmp_path / 'model'}", "--device=cpu"])
    (tmp_path / "model/speech.safetensors").unlink()
    with pytest.raises(SystemExit, match="a text model; overlap needs one that has learnt speech"):
        analyze.main(["overlap", f"--checkpoint={tmp_path / 'model'}", "--device=cpu"])


# ---------------------------------------------------------------------------------------------------------------------
# figures

def curves(axes):
    """{label: (x, y, colour)} of the lines in a picture."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_color())
            for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_several_models_in_one_picture(world, tmp_path):
    for name in ("text_model", "copy"):
        shutil.copytree(world[0], tmp_path / name)
    (tmp_path / "text_model/speech.safetensors").unlink()
    out, small, text_model, copy = tmp_path / "out", world[0], tmp_path / "text_model", tmp_path / "copy"
    rows, results = run(world, "dimension", out, checkpoint=f"{text_model},{small}", points=30, batches=2, words=8)
    assert {(row["model"], row["modality"]) for row in rows} == {
        ("text_model", "text"), ("small", "text"), ("small", "speech")}
    main, *scales = figures.dimension(results).axes
    assert {name: colour for name, (_, _, colour) in curves(main).items()} == {
        "text_model, text": "#0072B2", "small, text": "#D55E00", "small, speech": "#D55E00"}
    assert len(scales) == 3
    first = [row for row in rows if (row["model"], row["modality"], row["layer"]) == ("small", "text", "3")]
    x, y, _ = curves(scales[1])["layer 3"]
    assert x == [int(row["n"]) for row in first]
    assert y == pytest.approx([float(row["dimension"]) for row in first], rel=1e-4)

    rows, results = run(world, "weights", out, checkpoint=f"{small},{copy}", utterances=6)
    assert [row["model"] for row in rows] == ["small"] * (len(rows) // 2) + ["copy"] * (len(rows) // 2)
    assert results["models"]["small"]["phi"] == results["models"]["copy"]["phi"]
    titles = [axes.get_title() for axes in figures.weights(results).axes]
    assert [title.split(":")[0] for title in titles if "along an utterance" in title] == ["small", "copy"]


def test_layers_of_mostly_equal_points_are_left_out_of_the_picture():
    rows = [dict(model="a", modality="text", layer=layer, n=2**i, dimension=5.0 + layer, deviation=0.1,
                 chosen=int(i == 1), distinct=distinct)
            for layer, distinct in enumerate([49, 50, 100]) for i in range(3)]
    figure = figures.dimension(dict(models=dict(a=dict(text=dict(points=100))), rows=rows))
    _, y, _ = curves(figure.axes[0])["a, text"]
    assert np.isnan(y[0]) and y[1:] == [6, 7]


def test_loss_curves(tmp_path):
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
