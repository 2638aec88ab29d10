"""evaluate.py and benchmarks/: scoring against plain forward passes, each task on data whose result is known."""
import csv
import json
import lzma
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

import data
import evaluate
from benchmarks import hear, librispeech, report, sblimp, storycloze
from model import Config, SmolTolk, from_pretrained, save_pretrained
from runtime import datasets
from runtime.distributed import ALONE
from runtime.tokenizer import Tokenizer
from speech.espeak import espeak
from speech.mel import MelUnits

ROOT = Path(__file__).resolve().parent.parent
V, UNITS = 50, 10  # text ids 0..49, units 50..59, speech EOS 60, switch 61
TINY = Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, n_units=UNITS, initializer_range=0.2, max_position_embeddings=64)
BASELINE = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)


def tiny_model(**overrides):
    torch.manual_seed(0)
    model = SmolTolk(Config(**{**vars(TINY), **overrides})).eval()
    for layer in [*model.input_adapter, *model.output_adapter]:  # they start as the identity, which would hide them
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.3)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    return model


MODELS = {"smoltolk": tiny_model(), "baseline": tiny_model(**BASELINE)}


# ---------------------------------------------------------------------------------------------------------------------
# scoring

@torch.no_grad()
def by_hand(model, sequence, span=None):
    """ln p of the tokens of a span, from the logits of a plain forward pass of this sequence; without switch tokens."""
    first, end = span or (1, len(sequence))
    out = model(torch.tensor([sequence[:end - 1]]))
    text = model.text_logits(out.text[0]).log_softmax(-1)
    units = model.speech_logits(out.speech[0]).log_softmax(-1)
    values, vocab_size = [], model.config.vocab_size
    for t in range(first, end):
        if sequence[t] < vocab_size:
            values.append(float(text[t - 1, sequence[t]]))
        elif sequence[t] != model.config.switch:
            values.append(float(units[t - 1, sequence[t] - vocab_size]))
    return values


def assert_scored_as_alone(model, sequences, spans, **options):
    total, count = evaluate.log_likelihood(model, sequences, spans, **options)
    expected = [by_hand(model, sequence, span) for sequence, span in zip(sequences, spans)]
    np.testing.assert_allclose(total, [sum(values) for values in expected], atol=1e-4)
    assert count.tolist() == [len(values) for values in expected]


@st.composite
def items(draw):
    """(sequences, spans, number of candidates): candidates grow out of one another, so beginnings are shared."""
    sequences, spans, n_candidates = [], [], draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 4))):
        candidates = []
        for _ in range(n_candidates):
            trunk = draw(st.sampled_from(candidates)) if candidates else []
            trunk = trunk[:draw(st.integers(0, len(trunk)))]
            least = max(0, 2 - len(trunk))
            tail = draw(st.lists(st.sampled_from([0, 3, 49, 50, 57, 60, 61]), min_size=least, max_size=12))
            candidates.append([*trunk, *tail])
            first = draw(st.integers(1, len(candidates[-1]) - 1))
            spans.append((first, draw(st.integers(first + 1, len(candidates[-1])))))
        sequences += candidates
    return sequences, spans, n_candidates


@settings(max_examples=60, deadline=None)
@given(items(), st.sampled_from([20, 1000]), st.sampled_from([*MODELS]))
def test_candidates_side_by_side_score_as_alone(drawn, batch_tokens, name):
    sequences, spans, candidates = drawn
    assert_scored_as_alone(MODELS[name], sequences, spans, batch_tokens=batch_tokens, candidates=candidates)


def test_scores_alone_and_in_a_batch():
    rng, model = np.random.default_rng(0), MODELS["smoltolk"]
    sequences, spans = [], []
    for _ in range(40):
        n = int(rng.integers(3, 60))
        sequences.append(rng.choice([0, 7, 20, 49, 50, 55, 60, 61], n).tolist())
        first = int(rng.integers(1, n))
        spans.append((first, int(rng.integers(first + 1, n + 1))))
    assert_scored_as_alone(model, sequences, spans, batch_tokens=300)
    together, _ = evaluate.log_likelihood(model, sequences, spans, batch_tokens=300)
    alone = [evaluate.log_likelihood(model, [sequence], [span])[0][0] for sequence, span in zip(sequences, spans)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_row_holds_the_common_beginning_once():
    row = evaluate.make_row([[7, 8, 9, 1, 2], [7, 8, 9, 3, 5], [7, 8, 9, 1, 2]], [(2, 5), (4, 5), (2, 5)], [10, 11, 12])
    assert row.ids == [7, 8, 9, 1, 9, 3] and row.branch == [0, 0, 1, 1, 2, 2]
    assert row.targets == [-1, 9, 1, 2, -1, 5]  # -1: no candidate is scored there
    assert row.scored == [(10, [1, 2, 3]), (11, [5]), (12, [1, 2, 3])]


def test_equal_candidates_score_exactly_equal():
    rng = np.random.default_rng(0)
    sequences = []
    for n in (9, 5, 12, 9, 20, 7):
        context, ending, other = ([int(i) for i in rng.integers(0, 60, n)] for _ in range(3))
        sequences += [context + ending, context + other, context + ending, context + ending]
    spans = [(len(s) // 2, len(s)) for s in sequences]
    total, _ = evaluate.log_likelihood(MODELS["smoltolk"], sequences, spans, 100, candidates=4)
    a, b, c, d = total.reshape(-1, 4).T
    assert (a == c).all() and (a == d).all() and (a != b).all()


def test_a_row_may_be_longer_than_the_context():
    """Candidates that fill the context, beside shorter ones in one batch, whose rows are padded."""
    rng = np.random.default_rng(0)
    long = [[*[1] * 40, *rng.integers(0, 60, 25).tolist()] for _ in range(4)]
    short = [[*[2] * 45, *rng.integers(0, 60, 3).tolist()] for _ in range(4)]
    spans = [(40, len(s)) for s in long + short]
    rows = [evaluate.make_row(group, spans[:4], range(4)) for group in (long, short)]
    assert len(rows[0].ids) > len(rows[1].ids) + 64 - 45
    assert_scored_as_alone(MODELS["smoltolk"], long + short, spans, candidates=4)


@pytest.mark.parametrize("sequence, span, fault", [
    ([1, 2, 3], (0, 2), "nothing to score at tokens 0 to 2 of 3"), ([1, 2, 3], (2, 2), "nothing to score"),
    ([1, 2, 3], (1, 4), "nothing to score"), ([1] * 66, (1, 66), "65 positions, the model has 64")])
def test_unusable_spans(sequence, span, fault):
    with pytest.raises(ValueError, match=f"sequence 0: {fault}"):
        evaluate.log_likelihood(MODELS["smoltolk"], [sequence], [span])


def test_token_scores_are_those_of_transformers(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    texts = ["The following are questions about college physics.\nQuestion: What is 12 times 12?\nAnswer: 1443",
             "The following are questions about college physics.\nQuestion: What is 12 times 12?\nAnswer: 144",
             "Who should Derek hug after shocking Richard?", "Who should Derek hug Richard after shocking?"]
    sequences = [[0, *tokenizer.encode(text)] for text in texts]
    spans = [(1, len(sequence)) for sequence in sequences]
    ours = from_pretrained(smollm2_folder).eval()
    rows = [evaluate.make_row([sequence], [span], [0]) for sequence, span in zip(sequences, spans)]
    tokens = evaluate.score_batch(ours, rows)
    total, _ = evaluate.log_likelihood(ours, sequences, spans, candidates=2)
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            logp = theirs(torch.tensor([sequence])).logits[0].log_softmax(-1)
        expected = logp[range(len(sequence) - 1), sequence[1:]].numpy()
        np.testing.assert_allclose(tokens[i, :len(expected)], expected, atol=1e-4)
        assert total[i] == pytest.approx(expected.sum(), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(1, 64))
def test_windows_score_every_token_once(n, limit):
    windows = librispeech.overlapping_windows(n, limit)
    assert [t for _, first, end in windows for t in range(first, end)] == list(range(1, n))
    for start, first, end in windows:
        assert 0 <= start < first < end and end - start - 1 <= limit
        assert start == 0 or first - start > limit - limit // 2 - (limit < 2)  # half of the context is context


# ---------------------------------------------------------------------------------------------------------------------
# tasks, by a model whose log-likelihoods are known

def value(token):
    """ln p of a token under `Known`, whatever stands before it."""
    return -1.0 - token % 7 / 8


def beginnings(ids, branch):
    """All beginnings, as tuples, of the sequences that rows hold (see model.Layout)."""
    found = set()
    for row, branches in zip(ids.tolist(), branch.tolist()):
        read = {0: ()}  # {branch: the tokens up to here}
        for token, number in zip(row, branches):
            if number >= 0:  # no padding
                read[number] = (*read.get(number, read[0]), token)
                found.add(read[number])
    return found


class Known:
    """Stands in for a model: every token has a fixed log-likelihood. Remembers the sequences that it saw."""

    def __init__(self, config):
        self.config, self.seen = config, set()

    def parameters(self):
        yield torch.zeros(1)

    def named_parameters(self):
        yield "model.norm.weight", torch.zeros(1_000_000)

    def to(self, device):
        return self

    def eval(self):
        return self

    def __call__(self, ids, targets, layout):
        self.seen |= beginnings(ids, layout.branch)
        nll = 1 + targets.flatten() % 7 / 8
        return SimpleNamespace(text_nll=nll[layout.text],
                               speech_nll=None if layout.speech is None else nll[layout.speech])


@pytest.fixture
def world(tmp_path, demo_folder, monkeypatch):
    """A checkpoint folder whose model is Known; sound files hold their units as text: "5 6 7"."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(demo_folder / "tokenizer.json", folder)
    shutil.copy(demo_folder / "units" / "units.json", folder)
    for stem in ("model", "speech"):
        (folder / f"{stem}.safetensors").touch()
    tokenizer = Tokenizer(folder / "tokenizer.json")
    known = Known(Config(vocab_size=tokenizer.vocab_size, n_units=30))

    def hear_files(evaluator, files):
        return [[int(u) + known.config.vocab_size for u in Path(file).read_text().split()] for file in files]

    def run(task, *arguments):
        """(results, items) of one task."""
        out = tmp_path / "e.json"
        evaluate.main([f"--checkpoint={folder}", f"--tasks=['{task}']", f"--out={out}", "--device=cpu", *arguments])
        results = json.loads(out.read_text())
        names = results["made"][task]["items"]
        return results, {name: np.load(report.item_path(out, task, name)) for name in names}

    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: known)
    for module in (sblimp, storycloze):
        monkeypatch.setattr(module, "hear_files", hear_files)
    return SimpleNamespace(folder=folder, tmp=tmp_path, known=known, tokenizer=tokenizer, run=run)


def of_text(world, text):
    values = [value(token) for token in world.tokenizer.encode(text)]
    return np.array([sum(values), len(values)])


def of_units(world, units):
    values = [value(int(u) + world.known.config.vocab_size) for u in units.split()]
    return np.array([sum(values), len(values)])


def better(a, b):
    return float(a > b) + 0.5 * float(a == b)


def write_blimp(folder, pairs):
    folder.mkdir(exist_ok=True)
    lines = {}
    for good, bad, field, uid in pairs:
        item = dict(sentence_good=good, sentence_bad=bad, field=field, linguistics_term="t", UID=uid, pairID="0")
        lines.setdefault(uid, []).append(json.dumps(item))
    for uid, its_lines in lines.items():
        (folder / f"{uid}.jsonl").write_text("\n".join(its_lines) + "\n")


PAIRS = [("The cat sat.", "The cat sit.", "syntax", "a"), ("A dog runs", "A dog run", "syntax", "a"),
         ("same", "same", "morphology", "b"), ("One two three", "Two", "morphology", "b"),
         ("x y", "z", "semantics", "c")]


def test_blimp(world):
    write_blimp(world.tmp / "blimp", PAIRS)
    expected = {"sum": [], "mean": []}
    for good, bad, *_ in PAIRS:
        g, b = of_text(world, good), of_text(world, bad)
        expected["sum"].append(better(g[0], b[0]))
        expected["mean"].append(better(g[0] / g[1], b[0] / b[1]))
    assert expected["sum"] != expected["mean"]
    results, items = world.run("blimp", f"--blimp={world.tmp / 'blimp'}")
    blimp = results["blimp"]
    assert items["right"].tolist() == expected["sum"] and expected["sum"][2] == 0.5
    assert blimp["accuracy"] == pytest.approx(100 * np.mean(expected["sum"])) and blimp["items"] == 5
    assert blimp["stderr"] == pytest.approx(100 * np.std(expected["sum"]) / 5 ** 0.5)
    assert blimp["by_mean"] == pytest.approx(100 * np.mean(expected["mean"]))
    assert blimp["by_paradigm"]["a"]["accuracy"] == pytest.approx(100 * np.mean(expected["sum"][:2]))
    assert blimp["by_field"]["morphology"]["accuracy"] == pytest.approx(100 * np.mean(expected["sum"][2:4]))
    assert results["made"]["blimp"]["protocol"] == dict(score="sum", ties="share", bos=True)
    assert results["made"]["blimp"]["files"]["number"] == 3 and len(results["sha256"]["speech.safetensors"]) == 64
    assert (world.tokenizer.eos, *world.tokenizer.encode("A dog")) in world.known.seen
    _, items = world.run("blimp", f"--blimp={world.tmp / 'blimp'}", "--protocol.blimp.score=mean",
                         "--protocol.blimp.ties=wrong")
    assert items["right"].tolist() == [x if x != 0.5 else 0 for x in expected["mean"]]
    row = next(line for line in (world.tmp / "e.md").read_text().splitlines() if line.startswith("| **"))
    assert f"| **{100 * np.mean(items['right']):.1f}** |" in row and "| **1M** |" in row


@pytest.mark.parametrize("line, fault", [
    ('{"sentence_good": "", "sentence_bad": "a", "field": "f", "linguistics_term": "t", "UID": "u"}', "empty sentence"),
    ('{"sentence_good": "a"}', "not an item of BLiMP"), ("{", "no readable json"), ("7", "no readable json")])
def test_broken_blimp(world, line, fault):
    write_blimp(world.tmp / "blimp", PAIRS[:1])
    with open(world.tmp / "blimp/a.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(SystemExit, match=f"a.jsonl:2: {fault}"):
        world.run("blimp", f"--blimp={world.tmp / 'blimp'}")


QUESTIONS = [("high_school_biology", "What runs?", ["a cat", "the dog", "it", "stone and water"], "B"),
             ("high_school_biology", "Why, then?", ["no", "yes", "no", "it is so because it is so"], "D"),
             ("anatomy", "Where \"is\" it?\nHere?", ["in the knee", "one", "one", "a foot of 12"], "2")]


def write_mmlu(path, questions):
    with lzma.open(path, "wt", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["subject", "question", "A", "B", "C", "D", "answer"])
        writer.writerows([s, q, *choices, answer] for s, q, choices, answer in questions)


def test_mmlu(world):
    write_mmlu(world.tmp / "mmlu.csv.xz", QUESTIONS)
    expected = {"acc": [], "acc_norm": []}
    for _, _, choices, answer in QUESTIONS:
        answer = "ABCD".find(answer) if answer in "ABCD" else int(answer)
        sums = np.array([of_text(world, " " + choice)[0] for choice in choices])
        for name, scores in ("acc", sums), ("acc_norm", sums / [len(choice) for choice in choices]):
            best = [i for i in range(4) if scores[i] == max(scores)]
            expected[name].append((answer in best) / len(best))
    assert expected["acc"] != expected["acc_norm"]
    results, items = world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv.xz'}", f"--before={world.folder}")
    for name, right in expected.items():
        assert items[f"{name}.right"].tolist() == right
        biology, anatomy = np.mean(right[:2]), right[2]
        assert results["mmlu"][name]["accuracy"] == pytest.approx(100 * (biology + anatomy) / 2)  # over subjects
        assert results["mmlu"][f"{name}_by_subject"]["anatomy"]["accuracy"] == pytest.approx(100 * anatomy)
    prompt = 'The following are questions about high school biology.\nQuestion: What runs?\nAnswer:'
    assert (*world.tokenizer.encode(prompt), *world.tokenizer.encode(" the")) in world.known.seen  # and no EOS
    value = results["mmlu"]["acc_norm"]["accuracy"]
    assert f"**{value:.1f} / {value:.1f}**" in (world.tmp / "e.md").read_text()


def test_a_question_that_is_too_long_loses_its_beginning(world):
    world.known.config.max_position_embeddings = 40
    write_mmlu(world.tmp / "mmlu.csv.xz", [("anatomy", "long " * 100, ["a", "b b b", "c", "d"], "A"), QUESTIONS[2]])
    results, _ = world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv.xz'}")
    assert results["mmlu"]["cut_questions"] >= 1 and max(map(len, world.known.seen)) == 40


@pytest.mark.parametrize("change, fault", [
    (("s", "q", ["a", "", "c", "d"], "A"), "item 2: empty B"),
    (("s", " ", ["a", "b", "c", "d"], "A"), "item 2: empty question"),
    (("s", "q", ["a", "b", "c", "d"], "E"), "item 2: not an item of MMLU"),
    (("s", "q", ["a", "b", "c", "d"], ""), "item 2: not an item of MMLU .answer ''"),
    (("s", "q", ["a", "b", "c", "d"], "AB"), "item 2: not an item of MMLU .answer 'AB'"),
    (("s", "q", ["a", "b", "c"], "A"), "mmlu.csv.xz:[0-9]+: 6 fields, 7 columns")])
def test_broken_mmlu(world, change, fault):
    write_mmlu(world.tmp / "mmlu.csv.xz", [QUESTIONS[0], change])
    with pytest.raises(SystemExit, match=fault):
        world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv.xz'}")


@pytest.mark.parametrize("contents, fault", [
    ("subject,question,A,B,C,D\n", "mmlu.csv: no one column answer; it needs subject, question, A, B, C, D, answer"),
    ("subject,question,A,B,C,D,answer\n", "mmlu.csv: no items"),
    ('subject,question,A,B,C,D,answer\ns,q,"a"x,b,c,d,A\n', "mmlu.csv:2: no csv")])
def test_broken_csv(world, contents, fault):
    (world.tmp / "mmlu.csv").write_text(contents)
    with pytest.raises(SystemExit, match=fault):
        world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv'}")


# ---------------------------------------------------------------------------------------------------------------------
# sBLIMP

def test_sblimp_table_by_hand():
    """Two types, three pairs, up to three voices: type, subtype, id, voice, score of the right and wrong sentence."""
    spoken = [("agreement", "s", 1, "v1", -1.0, -2.0), ("agreement", "s", 1, "v2", -3.0, -2.0),
              ("agreement", "s", 1, "v3", -2.0, -2.0),  # pair: (1 + 0 + 1/2) / 3 = 1/2
              ("agreement", "s", 2, "v1", -1.0, -2.0),  # pair: 1
              ("island", "s", 1, "v1", -5.0, -2.0), ("island", "s", 1, "v2", -1.0, -2.0)]  # pair: 1/2
    rows, scores = [], {}
    for n, (kind, subtype, i, voice, right, wrong) in enumerate(spoken):
        for correct, score in ((0, wrong), (1, right)):
            rows.append(dict(type=kind, subtype=subtype, id=str(i), voice=voice, filename=f"{n}{correct}",
                             correct=str(correct)))
            scores[f"{n}{correct}"] = score
    table, right = sblimp.table(rows, scores)
    assert right.tolist() == [0.5, 1, 0.5]
    assert table["accuracy"] == pytest.approx(100 * 2 / 3) and table["items"] == 3
    assert table["stderr"] == pytest.approx(100 * (((1 / 6) ** 2 * 2 + (1 / 3) ** 2) / 3 / 3) ** 0.5)
    assert {k: v["accuracy"] for k, v in table["by_type"].items()} == pytest.approx({"agreement": 75, "island": 50})
    assert table["by_type_mean"] == pytest.approx(62.5)
    assert {k: v["accuracy"] for k, v in table["by_voice"].items()} == pytest.approx(
        {"v1": 100 * 2 / 3, "v2": 50, "v3": 50})


def write_sblimp(folder, sentences, split="dev"):
    """sentences: (id, voice, type, correct, units). File names as ZeroSpeech's, random; gold.csv in another order."""
    folder = folder / "syntactic" / split
    folder.mkdir(parents=True)
    with open(folder / "gold.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow("id filename voice type subtype correct transcription".split())
        for i, (key, voice, kind, correct, units) in enumerate(sentences):
            name = f"x{i * 37 % 101:03}"
            (folder / f"{name}.wav").write_text(units)
            writer.writerow([key, name, voice, kind, "sub", correct, "some words"])
    return folder


SPOKEN = [(1, "A", "agreement", 1, "1 2 3"), (1, "A", "agreement", 0, "4 5 6 7"), (1, "B", "agreement", 0, "9 9"),
          (1, "B", "agreement", 1, "9 9"), (2, "A", "island", 0, "3 8 1"), (2, "A", "island", 1, "5 6 12 20 20 20")]


def test_sblimp(world):
    write_sblimp(world.tmp, SPOKEN)
    test = world.tmp / "syntactic/test"
    test.mkdir()
    (test / "hidden.wav").write_text("1 2")
    means = {key[:2] + key[3:4]: np.divide(*of_units(world, key[4])) for key in SPOKEN}
    pairs = [(better(means[1, "A", 1], means[1, "A", 0]) + 0.5) / 2, better(means[2, "A", 1], means[2, "A", 0])]
    results, items = world.run("sblimp", f"--sblimp={world.tmp}")
    assert items["dev.right"].tolist() == pairs and results["sblimp"]["dev"]["items"] == 2
    assert results["sblimp"]["dev"]["by_voice"]["B"]["accuracy"] == 50
    submitted = dict(line.split(" ") for line in (world.tmp / "e.sblimp.dev.txt").read_text().splitlines())
    assert {name: float(score) for name, score in submitted.items()} == pytest.approx(
        {f"x{i * 37 % 101:03}": means[key[:2] + key[3:4]] for i, key in enumerate(SPOKEN)})
    assert (world.tmp / "e.sblimp.test.txt").read_text().split(" ")[0] == "hidden" and "test" not in results["sblimp"]
    config = world.known.config  # EOS, all units but the last as input; the EOS at the end is not scored
    assert (config.speech_eos, *(config.vocab_size + u for u in (4, 5, 6))) in world.known.seen
    assert items["dev.tokens"].tolist() == [len(path.read_text().split()) for path in
                                            sorted((world.tmp / "syntactic/dev").glob("*.wav"))]


@pytest.mark.parametrize("sentences, fault", [
    (SPOKEN + SPOKEN[:1], "gold.csv:8: a second sentence"), (SPOKEN[:-1], "missing the counterpart of"),
    ([(1, "A", "agreement", 2, "1")], "gold.csv:2: not a row"), ([], "no items")])
def test_broken_gold(world, sentences, fault):
    write_sblimp(world.tmp, sentences)
    with pytest.raises(SystemExit, match=fault):
        world.run("sblimp", f"--sblimp={world.tmp}")


def test_sblimp_files_missing_and_double(world):
    folder = write_sblimp(world.tmp, SPOKEN)
    (folder / "x037.wav").unlink()
    with pytest.raises(SystemExit, match="x037.wav: missing, though gold.csv names it"):
        world.run("sblimp", f"--sblimp={world.tmp}")
    gold = (folder / "gold.csv").read_text().replace("x037", "x000")
    (folder / "gold.csv").write_text(gold)
    with pytest.raises(SystemExit, match="gold.csv:3: filename 'x000' stands here a second time"):
        world.run("sblimp", f"--sblimp={world.tmp}")
    (folder / "gold.csv").write_text(gold.replace("some words", " ", 1))
    with pytest.raises(SystemExit, match="gold.csv:2: empty sentence"):
        world.run("sblimp", f"--sblimp={world.tmp}")


# ---------------------------------------------------------------------------------------------------------------------
# stories

def test_stories_of_twist(world):
    stories = [("1 2 3 4", "1 2 9 11 5"), ("7 8", "8 7"), ("14 21 13 13", "14 21 14")]
    for k, pair in enumerate(stories):
        for j, units in enumerate(pair):
            (world.tmp / f"{2 * k + j}_story-{k}_a_{('correct', 'incorrect')[j]}.wav").write_text(units)
    expected = [better(*(np.divide(*of_units(world, units)) for units in pair)) for pair in stories]
    assert expected[1] == 0.5
    results, items = world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    assert items["S.right"].tolist() == expected and set(results["sstorycloze"]) == {"S"}
    assert items["S.tokens"].tolist() == [4, 5, 2, 2, 4, 3]  # all of the story, and no EOS
    assert results["made"]["sstorycloze"]["notes"]["span"] == "whole"
    (world.tmp / "4_story-2_a_correct.wav").rename(world.tmp / "2_other_correct.wav")
    with pytest.raises(SystemExit, match="a second file with number 2"):
        world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    (world.tmp / "2_other_correct.wav").unlink()
    with pytest.raises(SystemExit, match="missing its counterpart, number 4"):
        world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    (world.tmp / "6_x_incorrect.wav").write_text("1")
    with pytest.raises(SystemExit, match="even numbers are correct"):
        world.run("sstorycloze", f"--sstorycloze={world.tmp}")


STORIES = {"bear": [("A bear slept.", "1 2 3"), ("It was winter.", "4 5"), ("It sang to nobody", "6 6 7 8")],
           "fox": [("The fox ran.", "9"), ("Away.", "10 11 12"), ("Away.", "10 11 12")],
           "owl": [("An owl.", "3 2"), ("Night came on at ten", "13 13 6"), ("Day", "5")]}


def write_stories(folder, suffixes=(".txt", ".wav")):
    for name, parts in STORIES.items():
        for part, contents in zip(("mutual", "correct", "incorrect"), parts):
            for suffix, content in zip((".txt", ".wav"), contents):
                if suffix in suffixes:
                    (folder / f"{name}_{part}{suffix}").write_text(content + ("\n" if suffix == ".txt" else ""))


def test_stories_in_four_settings(world):
    write_stories(world.tmp)
    written, spoken = ([better(*(np.divide(*of(world, ending)) for ending in endings)) for endings in choices]
                       for of, choices in ((of_text, [(" " + s[1][0], " " + s[2][0]) for s in STORIES.values()]),
                                           (of_units, [(s[1][1], s[2][1]) for s in STORIES.values()])))
    results, items = world.run("tstorycloze", f"--tstorycloze={world.tmp}")
    assert items["T.right"].tolist() == items["S->T.right"].tolist() == written and written[1] == 0.5
    assert items["S.right"].tolist() == items["T->S.right"].tolist() == spoken and spoken != written
    for setting in storycloze.MODALITIES:
        assert results["tstorycloze"][setting]["items"] == 3 and set(results["tstorycloze"]) == {*storycloze.MODALITIES}
    config, encode, units = world.known.config, world.tokenizer.encode, [world.known.config.vocab_size + u for u in
                                                                        (1, 2, 3)]
    assert (0, *encode("A bear slept."), *encode(" It")) in world.known.seen
    assert (0, *encode("A bear slept."), config.switch, config.vocab_size + 4) in world.known.seen
    assert (config.speech_eos, *units, config.switch, *encode(" It was")) in world.known.seen
    assert (config.speech_eos, *units, config.vocab_size + 4) in world.known.seen
    assert max(map(len, world.known.seen)) < 30
    row = next(line for line in (world.tmp / "e.md").read_text().splitlines() if line.startswith("| **"))
    assert row.split(" | ")[5:9] == [f"**{100 * np.mean(x):.1f}**" for x in (written, spoken, spoken, written)]


def test_options_of_stories(world):
    write_stories(world.tmp)
    _, items = world.run("tstorycloze", f"--tstorycloze={world.tmp}", "--protocol.tstorycloze.span=whole")
    whole = [of_text(world, s[0][0])[1] + of_units(world, s[j][1])[1] for s in STORIES.values() for j in (1, 2)]
    assert items["T->S.tokens"].tolist() == whole  # the switch token is not scored
    world.known.seen.clear()
    world.run("tstorycloze", f"--tstorycloze={world.tmp}", "--protocol.tstorycloze.prefix=10")
    units = [world.known.config.vocab_size + u for u in (1, 2, 3)]
    prefixed = {way for way in world.known.seen if way[11:] == (world.known.config.switch, *units)}
    assert len(prefixed) == 1 and prefixed.pop()[0] == 0  # text EOS, ten text tokens, the same for both endings
    assert (world.known.config.speech_eos, *units, units[0] + 3) in world.known.seen  # S has none
    with pytest.raises(SystemExit, match="protocol.tstorycloze.span=some: choose continuation or whole"):
        world.run("tstorycloze", f"--tstorycloze={world.tmp}", "--protocol.tstorycloze.span=some")


def test_stories_of_one_modality_and_broken_ones(world):
    write_stories(world.tmp, [".txt"])
    results, _ = world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    assert set(results["sstorycloze"]) == {"T"}
    (world.tmp / "fox_incorrect.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="fox_incorrect.txt: empty text"):
        world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    (world.tmp / "fox_incorrect.txt").unlink()
    with pytest.raises(SystemExit, match="fox_incorrect.txt: missing"):
        world.run("sstorycloze", f"--sstorycloze={world.tmp}")


def test_text_model_does_text_alone(world):
    (world.folder / "speech.safetensors").unlink()
    write_stories(world.tmp)
    results, _ = world.run("sstorycloze", f"--sstorycloze={world.tmp}")
    assert set(results["sstorycloze"]) == {"T"}
    with pytest.raises(SystemExit, match="sblimp needs speech, and this checkpoint has no speech.safetensors"):
        world.run("sblimp", f"--sblimp={world.tmp}")
    with pytest.raises(SystemExit, match="no task swuggy; choose among blimp"):
        world.run("swuggy")
    with pytest.raises(SystemExit, match="mmlu has no data; set --mmlu"):
        world.run("mmlu")
    with pytest.raises(SystemExit, match="nowhere: no such file or folder; mmlu is to be scored on it"):
        world.run("mmlu", "--mmlu=nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# documents

def test_nll_per_unit_and_per_token(world, demo_folder):
    world.known.config.max_position_embeddings = 48  # so that documents are read in windows
    units = dict(n_units=30, rate=25, hash=json.loads((world.folder / "units.json").read_text())["hash"])
    rng = np.random.default_rng(0)
    spoken = [rng.integers(0, 30, n).tolist() for n in (3, 47, 48, 49, 200)]
    datasets.write_set(world.tmp / "dev", "speech", spoken, units=units)
    results, items = world.run("librispeech", f"--librispeech=['{world.tmp / 'dev'}']")
    expected = np.array([of_units(world, " ".join(map(str, d))) for d in spoken])  # no EOS
    found = results["librispeech"]
    assert items["tokens"].tolist() == expected[:, 1].tolist() and found["documents"] == 5
    np.testing.assert_allclose(items["nll"], -expected[:, 0])
    assert found["nll"] == pytest.approx(-expected[:, 0].sum() / expected[:, 1].sum())
    assert max(map(len, world.known.seen)) == 48
    results, _ = world.run("text", f"--text=['{demo_folder / 'val'}']")  # a paired set, by its text
    val = datasets.open_set(demo_folder / "val")
    values = [value(int(token)) for token in val.text if token != 0]
    assert results["text"]["nll"] == pytest.approx(-np.mean(values), rel=1e-6)
    assert results["text"]["perplexity"] == pytest.approx(math.exp(-np.mean(values)), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# statistics

@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar(answers):
    a, b = np.array(answers, float).T
    only, other = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    found = report.compare(a, b)
    p = min(1.0, 2 * binom.cdf(min(only, other), only + other, 0.5))
    assert found["test"] == "McNemar" and found["p"] == pytest.approx(p)
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))


def test_bootstrap_agrees_with_the_normal_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.02, 1, 2000), rng.normal(0, 1, 2000)
    found, difference = report.compare(a, b, resamples=5000), a - b
    z = difference.mean() / (difference.std() / len(a) ** 0.5)
    assert found["test"] == "bootstrap" and found["p"] == pytest.approx(2 * norm.sf(abs(z)), abs=0.03)
    assert report.compare(a, a)["p"] == 1
    assert report.compare(a + 0.5, a)["p"] < 0.001
    answers = rng.choice([0, 0.5, 1], 300)
    assert report.compare(answers, 1 - answers)["test"] == "bootstrap"


def test_versus(world, monkeypatch):
    write_blimp(world.tmp / "blimp", PAIRS)
    _, ours = world.run("blimp", f"--blimp={world.tmp / 'blimp'}")
    ours = {name: array.copy() for name, array in ours.items()}

    class Contrary(Known):
        def __call__(self, *arguments, **more):
            out = super().__call__(*arguments, **more)
            return SimpleNamespace(text_nll=4 - out.text_nll)

    models = {"model": world.known, "other": Contrary(world.known.config)}
    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: models[path.name])
    shutil.copytree(world.folder, world.tmp / "other")
    results, _ = world.run("blimp", f"--blimp={world.tmp / 'blimp'}", f"--versus={world.tmp / 'other'}")
    theirs = np.load(world.tmp / "e.versus.items/blimp.right.npy")
    found = results["versus"]["scores"]["blimp"]
    assert found["difference"] == pytest.approx(100 * (ours["right"] - theirs).mean()) and 0 < found["p"] <= 1
    again, _ = world.run("blimp", f"--blimp={world.tmp / 'blimp'}", f"--versus={world.tmp / 'e.versus.json'}")
    assert again["versus"]["scores"] == results["versus"]["scores"]  # from what was written, without scoring once more
    with pytest.raises(SystemExit, match="blimp has other protocol"):
        world.run("blimp", f"--blimp={world.tmp / 'blimp'}", f"--versus={world.tmp / 'e.versus.json'}",
                  "--protocol.blimp.score=mean")


def test_table_7_is_the_papers():
    header, *rows = (line.split(";") for line in report.TABLE_7.read_text(encoding="utf-8").splitlines())
    assert len(header) == 14 and {len(row) for row in rows} == {14} and len(rows) == 23
    ours = next(row for row in rows if row[:3] == ["SmolTolk-150M", "150M", "16B"])
    assert ours[3:] == "79.4 58.0 88.4 82.0 75.2 81.0 64.1 55.0 58.8 58.4".split() + ["30.0 / 30.2"]


# ---------------------------------------------------------------------------------------------------------------------
# Topic-Cloze of the training run

class Oracle:
    """Stands in for a model that likes some tokens, so that every answer is known beforehand."""
    config = Config(vocab_size=V, n_units=UNITS)

    def __init__(self, liked):
        self.liked, self.seen = torch.tensor(liked), set()

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, ids, targets, layout):
        self.seen |= beginnings(ids, layout.branch)
        nll = torch.where(torch.isin(targets.flatten(), self.liked), 1.0, 3.0)
        return SimpleNamespace(text_nll=nll[layout.text],
                               speech_nll=None if layout.speech is None else nll[layout.speech])


def test_topic_cloze_counts_and_layout(tmp_path):
    tokenizer = SimpleNamespace(vocab_size=V, eos=0, hash="t")

    def document(text, units):
        return [[t] for t in text], [[u] for u in units]
    right = [document([1, 2], [1, 2]), document([30, 31], [3, 4]), document([40, 30, 41], [5, 6, 5])]
    documents = [*right, *right,
                 document([1, 2], [1, 2]), document([40, 41], [6, 6]), document([30], [3]),  # wrong
                 document([1, 2], [1, 2]), document([30], [3]), document([31, 31], [3, 4])]  # a tie: means are equal
    datasets.write_set(tmp_path / "cloze", "paired", documents, tokenizer, dict(n_units=UNITS, rate=25, hash="u"))
    oracle, cloze_set = Oracle(liked=[30, 31, 53, 54]), datasets.open_set(tmp_path / "cloze")
    answers = evaluate.topic_cloze(oracle, cloze_set)
    results = report.cloze_table(report.cloze_sums(answers))
    assert list(results) == ["T", "S", "T->S", "S->T"]
    for setting, result in results.items():
        assert answers[setting].tolist() == [1, 1, 0, 0.5]
        assert result["accuracy"] == pytest.approx(62.5) and result["items"] == 4
        assert result["stderr"] == pytest.approx(100 * np.std([1, 1, 0, 0.5]) / 4 ** 0.5)
    assert evaluate.topic_cloze(oracle, cloze_set, items=[3, 1])["S->T"].tolist() == [0.5, 1]
    assert len(evaluate.topic_cloze(oracle, cloze_set, items=[])["T"]) == 0
    assert evaluate.topic_cloze(oracle, cloze_set, stop=["SIGTERM"]) == {}
    assert {(0, 1, 2, 30), (60, 51, 52, 53)} <= oracle.seen  # no switch token inside one modality
    assert {(0, 1, 2, 61), (60, 51, 52, 61)} <= oracle.seen


@pytest.mark.parametrize("kind", ["text", "speech", "interleaved"])
def test_heldout_nll_is_that_of_plain_rows(demo_folder, kind):
    val = datasets.open_set(demo_folder / "val")
    model = tiny_model(vocab_size=val.meta["text"]["vocab_size"], n_units=30)
    source = data.open_source(kind, [demo_folder / "val"])
    parts = [evaluate.heldout_nll(model, {kind: source}, 1, 7, 24, batch_tokens=60, rank=rank, world_size=2)[kind]
             for rank in range(2)]
    rows = data.sample({kind: source}, {kind: 1}, 1, evaluate.VALIDATION, np.arange(7), 25, model.config)
    expected = np.zeros(4)
    for row in rows.tolist():
        targets = [token for token in row[1:] if token != model.config.switch]
        for target, logp in zip(targets, by_hand(model, row), strict=True):
            expected += [-logp, 0, 1, 0] if target < model.config.vocab_size else [0, -logp, 0, 1]
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-5)
    assert expected[3 if kind == "speech" else 2] > 0 and (expected[2:] > 0).all() == (kind == "interleaved")


# ---------------------------------------------------------------------------------------------------------------------
# the whole, with real sound and two processes

def test_what_was_heard_is_kept_by_content_not_by_place(tmp_path, monkeypatch):
    class Units:
        hash = "h"

        def encode(self, waves):
            return [(np.full(wave, wave, np.uint16), None) for wave in waves]

    monkeypatch.setattr("speech.units.load_units", lambda *_: Units())
    monkeypatch.setattr("speech.audio.read_audio", lambda path: int(Path(path).read_text()))

    def units_in(*files):
        options = SimpleNamespace(cache=str(tmp_path / "cache"), units="u")
        evaluator = SimpleNamespace(settings=options, used=[], made_with=(None, "h"), model=MODELS["smoltolk"],
                                    world=ALONE)
        return [len(ids) for ids in hear.hear_files(evaluator, list(files))]

    for folder, name, n in (("x", "1", 3), ("y", "0", 2), ("flat", "1", 3), ("flat", "0", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.wav").write_text(str(n))
    assert units_in(tmp_path / "x/1.wav", tmp_path / "y/0.wav") == [3, 2]
    monkeypatch.setattr(Units, "encode", None)  # they are kept now
    assert units_in(tmp_path / "flat/0.wav", tmp_path / "flat/1.wav") == [2, 3]
    [kept] = (tmp_path / "cache").glob("*.ids.npy")
    for damaged in ([1, 2, 3, 4], [1, 2, 3, 4, UNITS]):  # one unit too few; no such unit
        np.save(kept, np.array(damaged, np.uint16))
        with pytest.raises(ValueError, match="not the units of these files; remove it, they will be made again"):
            units_in(tmp_path / "flat/0.wav", tmp_path / "flat/1.wav")


@pytest.mark.parametrize("line, message", [
    ("--dtype=float16", "dtype=float16: choose float32 or bfloat16"), ("--out=x/y.json", "in a folder that is there"),
    ("--out=y.md", "give the name of a .json file"), ("--versus=no.json", "versus=no.json: no such file"),
    ("--versus=nowhere", "nowhere: no checkpoint here"), ("--before=nowhere", "nowhere: no checkpoint here"),
    ("--text_span=[5]", "text_span=.*: give the least and the most"), ("--batch_tokens=-5", "give 0 or more"),
    ("--protocol.topic_cloze.prefix=-3", "give 0 or more"), ("--device=mps", "choose auto or cpu")])
def test_settings_are_checked_before_anything_is_scored(tmp_path, monkeypatch, line, message):
    save_pretrained(tiny_model(), tmp_path)
    monkeypatch.setattr(evaluate, "score_checkpoint", None)
    with pytest.raises(SystemExit, match=message):
        evaluate.main([f"--checkpoint={tmp_path}", "--device=cpu", line])


def test_spoken_pairs_under_hiss(tmp_path):
    """Only the speakers that are named, and both sentences of a pair as far above their hiss."""
    soundfile = pytest.importorskip("soundfile")
    from corpora import demo
    from studies.small import spoken_blimp

    write_blimp(tmp_path / "blimp", PAIRS * 3)
    spoken_blimp.main([f"--source={tmp_path / 'blimp'}", f"--out={tmp_path / 'spoken'}", "--pairs=4", "--workers=1",
                       "--speakers=[1, 5]", "--hiss=true"])
    levels = {}
    for row in sblimp.read(tmp_path / "spoken/syntactic/dev/gold.csv"):
        heard, _ = soundfile.read(tmp_path / f"spoken/syntactic/dev/{row['filename']}.wav")
        clean, _ = espeak(row["transcription"], *demo.SPEAKERS[int(row["voice"][1:])])
        level = 10 * np.log10((clean**2).sum() / ((heard - clean) ** 2).sum())
        levels.setdefault((row["subtype"], row["id"], row["voice"]), []).append(level)
    assert {voice for *_, voice in levels} == {"s1", "s5"} and len(levels) == 8
    assert all(abs(a - b) < 0.5 and 4.5 < a < 15.5 for a, b in levels.values())
    assert np.std([a for a, _ in levels.values()]) > 1
    with pytest.raises(SystemExit, match=r"speakers=\[8\]: give numbers from 0 to 7"):
        spoken_blimp.main(["--speakers=[8]", f"--out={tmp_path / 'x'}"])


def test_two_processes_and_real_wavs(demo_folder, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    from studies.small import spoken_blimp

    units = json.loads((demo_folder / "units/units.json").read_text())
    tokenizer = Tokenizer(demo_folder / "tokenizer.json")
    model = tiny_model(vocab_size=tokenizer.vocab_size, n_units=units["n_units"], max_position_embeddings=2048)
    save_pretrained(model, tmp_path / "model")
    for file in ("tokenizer.json", "units/units.json"):
        shutil.copy(demo_folder / file, tmp_path / "model")
    write_blimp(tmp_path / "blimp", PAIRS * 3)
    write_mmlu(tmp_path / "mmlu.csv.xz", QUESTIONS * 3)
    spoken_blimp.main([f"--source={tmp_path / 'blimp'}", f"--out={tmp_path / 'spoken'}", "--pairs=4", "--workers=1"])
    rows = sblimp.read(tmp_path / "spoken/syntactic/dev/gold.csv")
    assert len(rows) == 4 * 2 * 2 and {row["correct"] for row in rows} == {"0", "1"}
    arguments = [f"--checkpoint={tmp_path / 'model'}", f"--blimp={tmp_path / 'blimp'}", "--device=cpu",
                 f"--mmlu={tmp_path / 'mmlu.csv.xz'}", f"--sblimp={tmp_path / 'spoken'}",
                 f"--units={demo_folder / 'units'}", f"--cloze={demo_folder / 'cloze'}", "--batch_tokens=200",
                 f"--val_text=['{demo_folder / 'val'}']", "--val_speech=[]", "--val_interleaved=[]",
                 "--sequence_length=32", "--val_sequences=9"]
    evaluate.main([*arguments, f"--out={tmp_path / 'one.json'}", f"--cache={tmp_path / 'cache1'}"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
               str(ROOT / "evaluate.py"), *arguments, f"--out={tmp_path / 'two.json'}",
               f"--cache={tmp_path / 'cache2'}"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert set(one["made"]) == {"blimp", "mmlu", "sblimp", "topic_cloze", "nll"} and two["processes"] == 2
    for task, made in one["made"].items():
        assert made["files"] == two["made"][task]["files"]
        for name in made["items"]:
            a, b = (np.load(report.item_path(tmp_path / f"{x}.json", task, name)) for x in ("one", "two"))
            np.testing.assert_allclose(b, a, rtol=1e-6, err_msg=f"{task} {name}")
    assert one["nll"]["text"]["text"] == pytest.approx(two["nll"]["text"]["text"], rel=1e-6)
    cached = {path.name: np.load(path) for path in (tmp_path / "cache1").iterdir()}
    for path in (tmp_path / "cache2").iterdir():
        np.testing.assert_array_equal(np.load(path), cached[path.name])
    precise = []  # what listens is not rounded to the precision of the scores
    monkeypatch.setattr(MelUnits, "encode", lambda *_: precise.append(not torch.is_autocast_enabled("cpu")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main([*arguments, "--tasks=['sblimp']", "--dtype=bfloat16", f"--cache={tmp_path / 'c3'}"])
    monkeypatch.undo()
    assert precise == [True]
    wav = next((tmp_path / "spoken/syntactic/dev").glob("*.wav"))
    soundfile.write(wav, np.zeros(100), 16000)  # other sound, so what was kept does not serve
    with pytest.raises(SystemExit, match=f"{wav.name}: too short for a single unit"):
        evaluate.main([*arguments, "--tasks=['sblimp']", f"--out={tmp_path / 'x.json'}", f"--cache={tmp_path / 'c3'}"])
