"""analyze.py and tools/figures.py: estimators against brute force, dadapy and known answers; each command; pictures."""
import csv
import json
import shutil
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
from runtime.tokenizer import Tokenizer
from speech.audio import read_audio
from speech.units import load_units
from tools import figures

positions = st.lists(st.integers(0, 40), max_size=15, unique=True).map(sorted)


@pytest.mark.parametrize("precision, recall, f1, r_value", [
    (30.3, 20.3, 24.5, 40.5), (50.5, 46.7, 48.4, 56.8), (37.6, 37.2, 37.4, 46.8), (33.3, 29.4, 31.2, 43.4),  # Table 3
    (100, 100, 100, 100), (0, 0, 0, 0)])
def test_scores_are_those_of_table_3_and_known_at_the_ends(precision, recall, f1, r_value):
    found = analyze.scores([precision * 10, 1000, recall * 10, 1000])
    assert [float(found[key]) for key in ("precision", "recall")] == pytest.approx([precision, recall])
    assert float(found["f1"]) == pytest.approx(f1, abs=0.2)
    assert float(found["r_value"]) == pytest.approx(r_value if recall else 100 - 50 * 2 ** 0.5, abs=0.15)


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


def test_boundaries_leave_out_the_ends_and_words_without_units():
    u = spoken([0, 2, 0, 3, 1, 0])
    assert u.boundaries().tolist() == [2, 5]
    assert u.boundary_times() == pytest.approx([0.08, 0.2])
    timed = u._replace(ends=np.array([0.0, 0.07, 0.07, 0.21, 0.24, 0.24]))
    assert timed.boundary_times() == pytest.approx([0.07, 0.21])
    axis = analyze.lay_out([spoken([7]), spoken([2, 2])], "units")  # a boundary of another utterance is out of reach
    assert analyze.count_hits(np.array([6]), axis, 4, "nearest").tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_planted_peaks_are_found_exactly_and_baselines_do_not_find_them():
    """A high peak at each boundary among low peaks, which tuning must learn to leave out."""
    rng, splits = np.random.default_rng(0), []
    for _ in range(2):
        utterances = [spoken(rng.integers(2, 9, size=12)) for _ in range(20)]
        signals = [0.02 * rng.random(len(u.units)) for u in utterances]
        for u, signal in zip(utterances, signals):
            signal[u.boundaries()] += 0.12
        methods = dict(planted=analyze.peaks(signals, analyze.PROMINENCES)) | analyze.baselines(utterances, 0)
        splits.append((methods, analyze.lay_out(utterances, "units")))
    rows = {row["method"]: row for row in analyze.tune_and_score(*splits, 0, "one-to-one", seed=1)}
    planted = rows.pop("planted")
    assert [planted[key] for key in ("precision", "recall", "f1", "r_value")] == [100] * 4
    assert 0.02 <= planted["setting"] <= 0.1 and planted["r_value_stderr"] == 0
    assert len(rows) == 4 and max(row["r_value"] for row in rows.values()) < 60


def test_baselines_predict_what_their_names_say():
    """Boundaries in two utterances of 7 and 4 units, none of them at a first unit."""
    methods = analyze.baselines([spoken([3, 4], [1, 1, 4, 1, 1, 1, 1]), spoken([2, 2])], seed=0)
    assert methods["every k units"][3].tolist() == [3, 6, 10]
    assert methods["every unit change"][1].tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert methods["unit-change rate, where it falls"][8].tolist() == [3]  # after the unit of four frames


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
    """Dimensions, errors and distances at all scales. Points that are repeated count once."""
    curves, distinct = analyze.gride(golden_points())
    np.testing.assert_allclose(curves, GOLDEN, rtol=1e-4)
    assert distinct == 600
    repeated, distinct = analyze.gride(np.concatenate([golden_points(), golden_points()[:99]]), max_rank=16)
    np.testing.assert_allclose(repeated[0], GOLDEN[0][:4], rtol=1e-4)
    assert distinct == 600


@pytest.mark.parametrize("shift", [0, 1e4])
def test_neighbours_agree_with_brute_force(shift):
    """Near and far from the origin, and for neighbours so close that rounding to float32 would hide their distances."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 40)) + shift
    x[250:] = x[:50] + 1e-5 * rng.standard_normal((50, 40))
    found = analyze.neighbour_distances(x, [1, 2, 16], at_once=2000)  # in several blocks
    np.testing.assert_allclose(found, np.sort(cdist(x, x), 1)[:, [1, 2, 16]], rtol=1e-4)


def test_far_outliers_are_left_out_of_the_dimension():
    mu = 1 + np.random.default_rng(0).pareto(1, 4000)
    kept = mu[mu < 20 * (np.quantile(mu, 0.95) - np.median(mu)) + np.median(mu)]
    assert analyze.gride_at(mu, 1)[0] == pytest.approx((len(kept) - 1) / np.log(kept).sum(), rel=1e-6)


@pytest.mark.parametrize("ids, distinct, index", [
    ([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], 10_000, 8), ([9, 7, 5, 4, 3.9, 3.9, 3, 2, 2, 2], 3000, 4),  # 2n <= 750
    ([5, 4], 10_000, 0), ([np.nan] * 5, 10_000, 0)])
def test_plateau_is_the_flattest_place_within_a_quarter_of_the_points(ids, distinct, index):
    assert analyze.plateau(ids, distinct) == index


def test_overlap_agrees_with_svd_also_when_points_are_repeated():
    rng = np.random.default_rng(0)
    counts, points = torch.from_numpy(rng.integers(0, 4, 300)), {}
    for name in ("x", "y"):
        cloud = rng.standard_normal((300, 12)) * np.geomspace(1, 0.05, 12) @ rng.standard_normal((12, 12)) + 3
        points[name] = torch.from_numpy(cloud)
    for weights, times in ((None, torch.ones_like(counts)), (counts, counts)):
        found = analyze.explained(points, 4, weights)
        repeated = {name: x.repeat_interleave(times, 0) for name, x in points.items()}
        centred = {name: x - x.mean(0) for name, x in repeated.items()}
        for a, b in found:
            basis = torch.linalg.svd(centred[b], full_matrices=False)[2][:4]
            expected = (centred[a] @ basis.T).square().sum() / centred[a].square().sum()
            assert found[a, b] == pytest.approx(float(expected), rel=1e-9)


SHAPE = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, n_units=10, max_position_embeddings=64)
BASELINE = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)


@pytest.mark.parametrize("overrides", [{}, BASELINE, dict(layer_pooling="fixed"), dict(num_key_value_heads=4)], ids=str)
@pytest.mark.parametrize("speaks", [True, False])
def test_forward_flops_are_what_torch_counts(overrides, speaks):
    config = Config(**{**SHAPE, **overrides})
    rows, T = 5, 24
    ids = torch.randint(61 if speaks else 50, (rows, T + 1))  # text, units and speech EOS
    layout = make_layout(ids[:, :-1], ids[:, 1:], config)
    if not speaks:
        layout = layout._replace(speech=None)
    # torch cannot count the CPU's attention kernel, but it can count its plain matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        out = SmolTolk(config).eval()(ids[:, :-1], ids[:, 1:], layout)
    counted = sum(forward_flops(config, rows, T, speaks, len(out.text_nll), len(out.speech_nll)))
    # torch counts attention over all T x T pairs, forward_flops the causal T (T + 1) / 2
    layers = config.num_hidden_layers + speaks * (config.input_adapter_layers + config.output_adapter_layers)
    assert counter.get_total_flops() == counted + layers * rows * 2 * config.hidden_size * (2 * T * T - T * (T + 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_folder):
    """(folder of a small random model with the demo's vocabularies, folder of the demo corpus)."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    meta = json.loads((demo_folder / "paired/meta.json").read_text())
    torch.manual_seed(0)
    net = SmolTolk(Config(**{**SHAPE, "max_position_embeddings": 256, "vocab_size": meta["text"]["vocab_size"],
                             "n_units": meta["speech"]["n_units"], "initializer_range": 0.3}))
    for parameter in net.layer_selector.parameters():  # a new selector gives all layers the same weight
        torch.nn.init.normal_(parameter)
    torch.nn.init.uniform_(net.model.norm.weight, 0.3, 3)  # so that the norm changes what was already normed
    save_pretrained(net, folder)
    for name in ("tokenizer.json", "units/units.json"):
        shutil.copy(demo_folder / name, folder)
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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_subsequences_are_different_and_stay_within_documents(tmp_path_factory, lengths, words, count, seed):
    """Word i is written as 1 or 2 tokens i and spoken as 0 to 2 units i, so that ids tell where a slice comes from."""
    def written(ids):
        return [[i] * (1 + i % 2) for i in ids]

    def heard(ids):
        return [[i] * (i % 3) for i in ids]

    folder, ends = tmp_path_factory.mktemp("sets") / "paired", np.cumsum([1, *lengths]).tolist()
    documents = [range(*edges) for edges in zip(ends, ends[1:])]
    write_set(folder, "paired", [(written(ids), heard(ids)) for ids in documents],
              SimpleNamespace(vocab_size=100, eos=0, hash="t"), dict(n_units=99, rate=25, hash="u"))
    shard = open_set(folder)
    found = analyze.subsequences([shard, shard], ("text", "speech"), words, count, seed)
    possible = [ids[i:i + words] for ids in documents for i in range(len(ids) - words + 1)]
    wanted = 2 * [(sum(written(ids), []), sum(heard(ids), [])) for ids in possible]
    assert len(found["text"]) == min(count, len(wanted))
    for text, speech in zip(found["text"], found["speech"]):
        wanted.remove((text.tolist(), speech.tolist()))  # ValueError if one comes too often


def test_words_of_a_text_set_begin_with_a_space(world, tmp_path):
    tokenizer = Tokenizer(world[0] / "tokenizer.json")
    texts = ["The moon rose. Tom saw it", "A cat sat", "on"]
    write_set(tmp_path / "text", "text", map(tokenizer.encode, texts), tokenizer)
    found = analyze.subsequences([open_set(tmp_path / "text")], ("text",), 3, 99, 0, tokenizer)["text"]
    assert sorted(tokenizer.decode(ids).strip() for ids in found) == [
        "A cat sat", "The moon rose.", "Tom saw it", "moon rose. Tom", "rose. Tom saw"]


def test_segmentation(world, tmp_path):
    """The scores of a baseline that can be counted by hand."""
    rows, _ = run(world, "segmentation", tmp_path)
    test = open_set(world[1] / "test")
    documents = [test.document(i) for i in range(test.meta["documents"])]
    true = sum(len(set(s[1:-2].tolist()) - {0, len(u) - 1}) for _, u, _, s in documents)
    predicted = sum(len(u) - 2 for _, u, _, _ in documents)
    assert {int(row["true"]) for row in rows} == {true}
    [every] = figures.select(rows, method="every unit change", matching="one-to-one", within="1 units")
    assert [float(every["precision"]), float(every["recall"])] == pytest.approx([100 * true / predicted, 100], abs=1e-3)


def test_weights(world, tmp_path):
    """Weights and their statistics are computed a second time from layer_weights."""
    rows, results = run(world, "weights", tmp_path, utterance=1)
    model, c = opened(world)
    utterances = analyze.read_utterances(world[1] / "test", model, c)
    omega = analyze.layer_weights(model.net, utterances, 256, "read")
    np.testing.assert_allclose([float(row["omega"]) for row in rows], omega[1].flatten(), rtol=1e-4)
    values = []  # of the last layer, three units after the first unit of a word
    for u, of_utterance in zip(utterances, omega):
        values += [of_utterance[i + 3, -1] for i in u.boundaries() if i + 3 < len(of_utterance)]
    found = results["models"]["small"]["last_layer_around_boundaries"]["3"]
    assert found == pytest.approx(np.mean(values), rel=1e-4)


def test_dimension_and_overlap(world, tmp_path):
    """The rows of the csv are those of gride and explained on the same states, which are clipped layer by layer."""
    few = dict(points=60, batches=2, words=8)
    rows, _ = run(world, "dimension", tmp_path, **few)
    for stream in ("text", "speech"):  # one scale is chosen in each layer
        assert [row["layer"] for row in figures.select(rows, modality=stream, chosen="1")] == list("0123")
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


def lens_by_hand(net, test, drawn):
    """[(layer, target, document, token, rank, ln p)], one document and one word at a time, from a sorted vocabulary.

    drawn: the random targets of the words that have units, with -1 for those that are left out.
    """
    found, drawn, V = [], iter(drawn), net.config.vocab_size
    for i in range(test.meta["documents"]):
        ids, units, text_words, speech_words = test.document(i)
        hidden = net(torch.from_numpy(np.append(net.config.speech_eos, units[:-1] + V))[None]).hidden
        tokens = ids[text_words[:-2]].tolist()  # all but the EOS
        for k, token in enumerate(tokens):
            if speech_words[k] == speech_words[k + 1]:
                continue
            wanted = dict(before=tokens[:k][-1:], after=tokens[k + 1:][:1], permutation=next(drawn))
            pairs = [("this", token), *((name, t) for name in wanted for t in wanted[name] if t not in (-1, token))]
            for layer, states in enumerate(hidden):
                x = states[0, speech_words[k + 1]]  # not one earlier, because the speech EOS comes first
                log_p = net.text_logits(net.model.norm(x) if layer < 3 else x).log_softmax(-1)
                order = log_p.argsort(descending=True).tolist()
                found += [(layer, name, i, t, order.index(t) + 1, float(log_p[t])) for name, t in pairs]
    return found


@torch.inference_mode()
def test_lens(world, tmp_path):
    rows, _ = run(world, "lens", tmp_path, bootstrap=8, batch_tokens=300)
    model, c = opened(world)
    test, utterances = open_set(world[1] / "test"), analyze.read_utterances(world[1] / "test", model, c)
    drawn = analyze.spoken_words(utterances, 5, seed=1).targets[:, 3:].tolist()
    by_hand = lens_by_hand(model.net, test, drawn)
    draws = analyze.bootstrap_counts(np.random.default_rng(1), test.meta["documents"], 8)
    for layer in range(4):
        means = {}  # of each target in each bootstrap sample
        for name, target in dict(permutation="permutation", this="this word", before="word before",
                                 after="word after").items():
            document, token, rank, log_p = np.array([x[2:] for x in by_hand if x[:2] == (layer, name)]).T
            [row] = figures.select(rows, layer=str(layer), target=target)
            row = {key: float(value) for key, value in row.items() if key not in ("model", "target")}
            of_tokens = [np.mean(1 / rank[token == t]) for t in set(token)]
            assert (row["targets"], row["tokens"]) == (len(rank), len(of_tokens))
            assert row["mrr"] == pytest.approx(np.mean(of_tokens), rel=1e-3)
            weight, means[name] = np.array([1 / (token == t).sum() for t in token]), []
            for draw in draws:
                chosen = np.concatenate([np.flatnonzero(document == i) for i in np.repeat(range(len(draw)), draw)])
                means[name].append(np.average(1 / rank[chosen], weights=weight[chosen]))
            assert row["mrr_stderr"] == pytest.approx(np.std(means[name]), rel=0.01)
            gains = np.subtract(means[name], means["permutation"])
            assert row["gain_stderr"] == pytest.approx(np.std(gains), rel=0.01, abs=1e-9)
            expected = dict(mrr_over_words=np.mean(1 / rank), median_rank=np.median(rank), log_p=log_p.mean(),
                            top_1=100 * np.mean(rank < 2), top_10=100 * np.mean(rank < 11))
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=0.01)


def test_lens_targets_are_those_of_the_neighbours():
    """A word without units is not looked at, but it is a neighbour. Equal neighbours and the ends are left out."""
    first, second = spoken([2, 0, 3, 1]), spoken([1, 1])
    utterances = [first._replace(first_tokens=np.array([5, 6, 7, 7])), second._replace(first_tokens=np.array([8, 5]))]
    words = analyze.spoken_words(utterances, 40, seed=0)
    assert words.utterance.tolist() == [0, 0, 0, 1, 1] and words.position.tolist() == [2, 5, 6, 1, 2]
    assert words.targets[:, :3].tolist() == [[5, -1, 6], [7, 6, -1], [7, -1, -1], [8, -1, 5], [5, 8, -1]]
    own, drawn = words.targets[:, :1], words.targets[:, 3:]
    assert [set(row) for row in drawn.tolist()] == [{-1, 7, 8}, {-1, 5, 8}, {-1, 5, 8}, {-1, 5, 7}, {-1, 7, 8}]
    assert (np.sort(np.where(drawn < 0, own, drawn), axis=0) == np.sort(own, axis=0)).all()  # each is a permutation
    assert words.left_out == {
        "words without units": 1, "word before": dict(none=2, same_token=1), "word after": dict(none=2, same_token=1),
        "permutation": dict(none=0, same_token=(drawn < 0).sum())}


def test_lens_finds_words_where_they_are_planted(tmp_path):
    """Word i is spoken as unit 0 and unit i. Layers 0 and 1 hold token i, and the last layer holds token i + 1."""
    small = dict(vocab_size=12, hidden_size=12, intermediate_size=12, num_hidden_layers=2, n_units=12)
    net = SmolTolk(Config(**{**SHAPE, **BASELINE, **small, "num_attention_heads": 1, "num_key_value_heads": 1}))
    identity, last = torch.eye(12), net.model.layers[1].mlp
    with torch.no_grad():
        for layer in net.model.layers:  # they change nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for linear in (net.model.embed_tokens, last.gate_proj, last.up_proj):
            linear.weight.copy_(identity)
        net.speech_embed.weight[:12] = identity
        last.down_proj.weight.copy_(identity.roll(1, 0))  # from token i to token i + 1
    save_pretrained(net, tmp_path / "planted")
    documents = [[1 + (i + k) % 9 for k in range(n)] for i, n in enumerate([9, 5, 7, 2, 8, 3, 6, 9, 4])]
    write_set(tmp_path / "set", "paired", [([[i] for i in ids], [[0, i] for i in ids]) for ids in documents],
              SimpleNamespace(vocab_size=12, eos=0, hash="t"), dict(n_units=12, rate=25, hash="u"))
    rows, _ = run((tmp_path / "planted", tmp_path), "lens", tmp_path, data=tmp_path / "set")
    first = {target: [float(row["top_1"]) for row in figures.select(rows, target=target)] for target in analyze.TARGETS}
    assert first["this word"] == [100, 100, 0] and first["word before"] == [0, 0, 0]
    after = np.concatenate([ids[1:] for ids in documents])  # word 1 comes after word 9, which becomes token 10
    assert first["word after"] == [0, 0, pytest.approx(100 * np.mean(after != 1), rel=1e-4)]
    assert figures.column(figures.select(rows, target="this word"), "mrr").tolist()[:2] == [1, 1]


def test_scaling(world, tmp_path):
    """Tokens and FLOPs at an evaluation are interpolated. The run was killed while it wrote its last line."""
    run_folder = tmp_path / "one"
    run_folder.mkdir()
    lines = [dict(step=s, stage="text", tokens=100 * s, flops=1000 * s, text_nll=5 / s) for s in (10, 20, 30)]
    lines.insert(1, dict(step=15, stage="text", nll=dict(speech=dict(speech=2.5))))
    log = run_folder / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "st')
    rows, _ = run(world, "scaling", tmp_path, checkpoint=run_folder, metrics="nll/speech/speech,text_nll")
    [held_out] = figures.select(rows, metric="nll/speech/speech")
    assert [held_out[key] for key in ("run", "value", "tokens", "flops")] == ["one", "2.5", "1500", "15000"]
    figures.main([str(log)])
    assert (run_folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_recordings_in_true_time(world, tmp_path):
    """Through corpora/manifest.py: units come from the sound, times of words from the manifest."""
    lines = [dict(audio="missing.wav", text="gone", words=[["gone", 0, 1]])]
    for i in range(2):
        (tmp_path / f"{i}.wav").write_bytes((world[1] / f"wavs/{i}.wav").read_bytes())
        words = (world[1] / f"wavs/{i}.txt").read_text().split()[:8]
        times = [[w, 0.3 * k, 0.3 * k + 0.25] for k, w in enumerate(words)]
        lines.append(dict(audio=f"{i}.wav", start=0, end=2.4, text=" ".join(words), words=times))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dict(corpus="manifest", units=str(world[1] / "units"))
    u = analyze.read_utterances(tmp_path, *opened(world, **options))[1]
    [(ids, frame_start)] = load_units(world[1] / "units").encode([read_audio(tmp_path / "1.wav", 0, 2.4)])
    assert u.units.tolist() == ids.tolist() and u.starts[:-1].tolist() == (frame_start / 25).tolist()
    assert u.boundary_times() == pytest.approx(0.3 * np.arange(7) + 0.25)
    rows, _ = run(world, "segmentation", tmp_path / "out", data=tmp_path, val=tmp_path, **options)
    assert {int(row["true"]) for row in figures.select(rows, within="40 ms")} == {14}
    with pytest.raises(SystemExit, match="--corpus=manifest: lens needs the text tokens of a paired data set"):
        run(world, "lens", tmp_path / "out", data=tmp_path, **options)


@pytest.mark.parametrize("arguments, message", [
    (["segment"], "segment: no such command; write one of segmentation"),
    (["dimension", "--scale=6"], "scale=6: give 0 or a power of 2"),
    (["overlap", "--words=500"], "0 subsequences of 500 words, too few for 5 batches"),
    (["weights", "--checkpoint={tmp}/last"], "last: has no layer selector"),
    (["overlap", "--checkpoint={tmp}/text"], "text: a text model; give a model that was trained on speech"),
    (["lens", "--checkpoint={tmp}/text"], "text: a text model; give a model that was trained on speech"),
    (["lens", "--permutations=0"], "permutations=0: give 1 or more"),
    (["scaling"], "log.jsonl: not there")])
def test_errors_are_one_line(world, tmp_path, arguments, message):
    for name in ("last", "text"):
        save_pretrained(SmolTolk(Config(**{**SHAPE, **BASELINE})), tmp_path / name)
    (tmp_path / "text/speech.safetensors").unlink()
    options = [f"--checkpoint={world[0]}", f"--data={world[1] / 'test'}", f"--out={tmp_path}", "--device=cpu"]
    command, *more = (argument.replace("{tmp}", str(tmp_path)) for argument in arguments)
    with pytest.raises(SystemExit, match=message) as caught:
        analyze.main([command, *options, *more])
    assert "\n" not in str(caught.value)
