"""evaluate.py and benchmarks/: scoring against plain forward passes, each task on data whose result is known."""
import csv
import io
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
def test_candidates_in_one_row_score_as_alone(drawn, batch_tokens, name):
    sequences, spans, candidates = drawn
    assert_scored_as_alone(MODELS[name], sequences, spans, batch_tokens=batch_tokens, candidates=candidates)


def test_a_row_may_be_longer_than_the_context():
    """Candidates that fill the context are in one batch with shorter ones, whose rows are padded."""
    rng = np.random.default_rng(0)
    long = [[*[1] * 40, *rng.integers(0, 60, 25).tolist()] for _ in range(4)]
    short = [[*[2] * 45, *rng.integers(0, 60, 3).tolist()] for _ in range(4)]
    spans = [(40, len(s)) for s in long + short]
    assert len(evaluate.make_row(long, spans, range(4)).ids) > 64
    assert_scored_as_alone(MODELS["smoltolk"], long + short, spans, candidates=4)


def test_a_row_holds_the_common_beginning_once():
    row = evaluate.make_row([[7, 8, 9, 1, 2], [7, 8, 9, 3, 5], [7, 8, 9, 1, 2]], [(2, 5), (4, 5), (2, 5)], [10, 11, 12])
    assert row.ids == [7, 8, 9, 1, 9, 3] and row.branch == [0, 0, 1, 1, 2, 2]
    assert row.targets == [-1, 9, 1, 2, -1, 5]  # -1: no candidate is scored there
    assert row.scored == [(10, [1, 2, 3]), (11, [5]), (12, [1, 2, 3])]  # equal candidates score exactly equal


@pytest.mark.parametrize("sequence, span, fault", [
    ([1, 2, 3], (0, 2), "nothing to score at tokens 0 to 2 of 3"), ([1, 2, 3], (2, 2), "nothing to score"),
    ([1, 2, 3], (1, 4), "nothing to score"), ([1] * 66, (1, 66), "65 positions, the model has 64")])
def test_unusable_spans_are_refused(sequence, span, fault):
    with pytest.raises(ValueError, match=f"sequence 0: {fault}"):
        evaluate.log_likelihood(MODELS["smoltolk"], [sequence], [span])


def test_scores_are_those_of_transformers(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(smollm2_folder / "tokenizer.json")
    texts = ["Question: What is 12 times 12?\nAnswer: 1443", "Question: What is 12 times 12?\nAnswer: 144",
             "Who should Derek hug after shocking Richard?", "Who should Derek hug Richard after shocking?"]
    sequences = [[0, *tokenizer.encode(text)] for text in texts]
    ours, spans = from_pretrained(smollm2_folder).eval(), [(1, len(sequence)) for sequence in sequences]
    total, _ = evaluate.log_likelihood(ours, sequences, spans, candidates=2)
    for sequence, score in zip(sequences, total):
        with torch.no_grad():
            logp = theirs(torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert score == pytest.approx(float(logp[range(len(sequence) - 1), sequence[1:]].sum()), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(1, 64))
def test_windows_score_every_token_once(n, limit):
    windows = librispeech.overlapping_windows(n, limit)
    assert [t for _, first, end in windows for t in range(first, end)] == list(range(1, n))
    for start, first, end in windows:
        assert 0 <= start < first < end and end - start - 1 <= limit
        assert start == 0 or first - start > limit - limit // 2 - (limit < 2)  # half of the context is context


# ---------------------------------------------------------------------------------------------------------------------
# a model whose log-likelihoods are known

def nll_of(token):
    """-ln p of a token under `Known`, after any context."""
    return 1 + token % 7 / 8


class Known:
    """Stands in for a model: every token has a fixed NLL. Remembers all beginnings of the sequences that it read."""

    def __init__(self, config, nll=nll_of):
        self.config, self.nll, self.seen = config, nll, set()

    def parameters(self):
        yield torch.zeros(1)

    def named_parameters(self):
        yield "model.norm.weight", torch.zeros(1_000_000)

    def to(self, device):
        return self

    def eval(self):
        return self

    def __call__(self, ids, targets, layout):
        for row, branches in zip(ids.tolist(), layout.branch.tolist()):
            read = {0: ()}  # {branch: the tokens so far}, see model.Layout
            for token, number in zip(row, branches):
                if number >= 0:  # no padding
                    read[number] = (*read.get(number, read[0]), token)
                    self.seen.add(read[number])
        nll = self.nll(targets.flatten())
        return SimpleNamespace(text_nll=nll[layout.text], speech_nll=None if layout.speech is None else
                               nll[layout.speech])


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
        """(results, items) of one task, by default on the files in tmp_path/task."""
        out, place = tmp_path / "e.json", [] if task in ("librispeech", "text") else [f"--{task}={tmp_path / task}"]
        evaluate.main([f"--checkpoint={folder}", f"--tasks=['{task}']", f"--out={out}", "--device=cpu", *place,
                       *arguments])
        results = json.loads(out.read_text())
        names = results["made"][task]["items"]
        return results, {name: np.load(report.item_path(out, task, name)) for name in names}

    def write(files):
        """Write {path under tmp_path: text}."""
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    def score(text="", units=""):
        """Summed and mean log-likelihood of a text or of units."""
        ids = tokenizer.encode(text) + [known.config.vocab_size + int(u) for u in units.split()]
        values = [-nll_of(i) for i in ids]
        return sum(values), sum(values) / len(values)

    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: known)
    for module in (sblimp, storycloze):
        monkeypatch.setattr(module, "hear_files", hear_files)
    return SimpleNamespace(folder=folder, tmp=tmp_path, known=known, tokenizer=tokenizer, run=run, write=write,
                           score=score)


def better(a, b):
    return float(a > b) + 0.5 * float(a == b)


def as_csv(header, rows):
    file = io.StringIO()
    csv.writer(file).writerows([header.split(), *rows])
    return file.getvalue()


def our_row(world):
    """The cells of our row of Table 7."""
    [line] = [line for line in (world.tmp / "e.md").read_text().splitlines() if line.startswith("| **")]
    return line.strip("| ").split(" | ")


# ---------------------------------------------------------------------------------------------------------------------
# BLiMP and MMLU

PAIRS = [("The cat sat.", "The cat sit.", "syntax", "a"), ("A dog runs", "A dog run", "syntax", "a"),
         ("same", "same", "morphology", "b"), ("One two three", "Two", "morphology", "b"),
         ("x y", "z", "semantics", "c")]


def blimp_files(pairs, folder="blimp"):
    files = {}
    for good, bad, field, uid in pairs:
        item = dict(sentence_good=good, sentence_bad=bad, field=field, linguistics_term="t", UID=uid)
        files[f"{folder}/{uid}.jsonl"] = files.get(f"{folder}/{uid}.jsonl", "") + json.dumps(item) + "\n"
    return files


def test_blimp(world):
    world.write(blimp_files(PAIRS))
    by_sum, by_mean = ([better(world.score(good)[m], world.score(bad)[m]) for good, bad, *_ in PAIRS] for m in (0, 1))
    assert by_sum != by_mean and by_sum[2] == by_mean[2] == 0.5
    results, items = world.run("blimp")
    blimp = results["blimp"]
    assert items["right"].tolist() == by_sum and blimp["items"] == 5
    assert blimp["accuracy"] == pytest.approx(100 * np.mean(by_sum))
    assert blimp["stderr"] == pytest.approx(100 * np.std(by_sum) / 5 ** 0.5)
    assert blimp["by_mean"] == pytest.approx(100 * np.mean(by_mean))
    assert blimp["by_paradigm"]["a"]["accuracy"] == pytest.approx(100 * np.mean(by_sum[:2]))
    assert blimp["by_field"]["morphology"]["accuracy"] == pytest.approx(100 * np.mean(by_sum[2:4]))
    assert results["made"]["blimp"]["protocol"] == dict(score="sum", ties="share", bos=True)
    assert results["made"]["blimp"]["files"]["number"] == 3 and len(results["sha256"]["speech.safetensors"]) == 64
    assert (world.tokenizer.eos, *world.tokenizer.encode("A dog")) in world.known.seen
    for ties, tied in (("wrong", 0), ("first", 1)):
        _, items = world.run("blimp", "--protocol.blimp.score=mean", f"--protocol.blimp.ties={ties}")
        assert items["right"].tolist() == [tied if x == 0.5 else x for x in by_mean]
    assert our_row(world)[1] == "**1M**" and our_row(world)[3] == f"**{100 * np.mean(items['right']):.1f}**"


QUESTIONS = [("high_school_biology", "What runs?", "a cat", "the dog", "it", "stone and water", "B"),
             ("high_school_biology", "Why, then?", "no", "yes", "no", "it is so because it is so", "D"),
             ("anatomy", "Where \"is\" it?\nHere?", "in the knee", "one", "one", "a foot of 12", "2")]
MMLU = "subject question A B C D answer"


def test_mmlu(world):
    (world.tmp / "mmlu.csv.xz").write_bytes(lzma.compress(as_csv(MMLU, QUESTIONS).encode()))
    expected = {"acc": [], "acc_norm": []}
    for _, _, *choices, answer in QUESTIONS:
        sums = np.array([world.score(" " + choice)[0] for choice in choices])
        for name, scores in ("acc", sums), ("acc_norm", sums / [len(choice) for choice in choices]):
            best = [i for i in range(4) if scores[i] == max(scores)]
            expected[name].append(("ABCD0123".find(answer) % 4 in best) / len(best))
    assert expected["acc"] != expected["acc_norm"]
    results, items = world.run("mmlu", f"--mmlu={world.tmp / 'mmlu.csv.xz'}", f"--before={world.folder}")
    for name, right in expected.items():
        assert items[f"{name}.right"].tolist() == right
        over_subjects = (np.mean(right[:2]) + right[2]) / 2
        assert results["mmlu"][name]["accuracy"] == pytest.approx(100 * over_subjects)
        assert results["mmlu"][f"{name}_by_subject"]["anatomy"]["accuracy"] == pytest.approx(100 * right[2])
    prompt = 'The following are questions about high school biology.\nQuestion: What runs?\nAnswer:'
    assert (*world.tokenizer.encode(prompt), *world.tokenizer.encode(" the")) in world.known.seen  # and no EOS
    value = results["mmlu"]["acc_norm"]["accuracy"]
    assert our_row(world)[-1] == f"**{value:.1f} / {value:.1f}**"  # after and before speech training


def test_a_question_that_is_too_long_loses_its_beginning(world):
    world.known.config.max_position_embeddings = 40
    world.write({"mmlu": as_csv(MMLU, [("anatomy", "long " * 100, "a", "b b b", "c", "d", "A"), QUESTIONS[2]])})
    results, _ = world.run("mmlu")
    assert results["mmlu"]["cut_questions"] >= 1 and max(map(len, world.known.seen)) == 40


# ---------------------------------------------------------------------------------------------------------------------
# sBLIMP

def sblimp_files(sentences):
    """sentences: (id, voice, type, correct, units). The names of the files are in another order than gold.csv."""
    files, rows = {}, []
    for i, (key, voice, kind, correct, units) in enumerate(sentences):
        files[f"sblimp/syntactic/dev/x{i * 37 % 101:03}.wav"] = units
        rows.append((key, f"x{i * 37 % 101:03}", voice, kind, "sub", correct, "some words"))
    return files | {"sblimp/syntactic/dev/gold.csv":
                    as_csv("id filename voice type subtype correct transcription", rows)}


SPOKEN = [(1, "A", "agreement", 1, "1 2 3"), (1, "A", "agreement", 0, "4 5 6 7"), (1, "B", "agreement", 0, "9 9"),
          (1, "B", "agreement", 1, "9 9"), (2, "A", "island", 0, "3 8 1"), (2, "A", "island", 1, "5 6 12 20 20 20"),
          (3, "A", "agreement", 1, "0 7"), (3, "A", "agreement", 0, "6 13 6")]


def test_sblimp(world):
    """A pair is averaged over its voices; then come means over pairs, over types and over voices."""
    world.write(sblimp_files(SPOKEN) | {"sblimp/syntactic/test/hidden.wav": "1 2"})
    means = [world.score(units=units)[1] for *_, units in SPOKEN]
    answers = [better(means[0], means[1]), 0.5, better(means[5], means[4]), better(means[6], means[7])]
    pairs = [(answers[0] + 0.5) / 2, answers[2], answers[3]]
    results, items = world.run("sblimp")
    dev = results["sblimp"]["dev"]
    assert sorted(items["dev.right"]) == sorted(pairs) and dev["items"] == 3
    assert dev["accuracy"] == pytest.approx(100 * np.mean(pairs))
    assert dev["stderr"] == pytest.approx(100 * np.std(pairs) / 3 ** 0.5)
    assert dev["by_type_mean"] == pytest.approx(100 * np.mean([np.mean([pairs[0], pairs[2]]), pairs[1]]))
    assert dev["by_type_mean"] != pytest.approx(dev["accuracy"])
    assert dev["by_voice"]["B"] == dict(accuracy=50, stderr=0, items=1) and dev["by_voice"]["A"]["items"] == 3
    submitted = dict(line.split(" ") for line in (world.tmp / "e.sblimp.dev.txt").read_text().splitlines())
    assert {name: float(score) for name, score in submitted.items()} == pytest.approx(
        {f"x{i * 37 % 101:03}": mean for i, mean in enumerate(means)})
    assert (world.tmp / "e.sblimp.test.txt").read_text().split(" ")[0] == "hidden" and "test" not in results["sblimp"]
    config = world.known.config  # EOS and all units but the last are read; the EOS at the end is not scored
    assert (config.speech_eos, *(config.vocab_size + u for u in (4, 5, 6))) in world.known.seen
    in_order = sorted(range(8), key=lambda i: i * 37 % 101)
    assert items["dev.tokens"].tolist() == [len(SPOKEN[i][4].split()) for i in in_order]


# ---------------------------------------------------------------------------------------------------------------------
# stories

STORIES = {"bear": [("A bear slept.", "1 2 3"), ("It was winter.", "4 5"), ("It sang to nobody", "6 6 7 8")],
           "fox": [("The fox ran.", "9"), ("Away.", "10 11 12"), ("Away.", "10 11 12")],
           "owl": [("An owl.", "3 2"), ("Night came on at ten", "13 13 6"), ("Day", "5")]}


def story_files(folder, suffixes=(".txt", ".wav")):
    files = {}
    for name, parts in STORIES.items():
        for part, contents in zip(("mutual", "correct", "incorrect"), parts):
            named = {f"{folder}/{name}_{part}{suffix}": text for suffix, text in zip((".txt", ".wav"), contents)}
            files |= {path: text for path, text in named.items() if path.endswith(suffixes)}
    return files


TWIST = {"0_story-0_a_correct.wav": "1 2 3 4", "1_story-0_a_incorrect.wav": "1 2 9 11 5", "2_correct.wav": "7 8",
         "3_incorrect.wav": "8 7", "4_c_correct.wav": "14 21 13 13", "5_c_incorrect.wav": "14 21 14"}


def test_stories_of_twist(world):
    world.write({f"sstorycloze/{name}": units for name, units in TWIST.items()})
    means = [world.score(units=units)[1] for units in TWIST.values()]
    expected = [better(right, wrong) for right, wrong in zip(means[::2], means[1::2])]
    assert expected[1] == 0.5
    results, items = world.run("sstorycloze")
    assert items["S.right"].tolist() == expected and set(results["sstorycloze"]) == {"S"}
    assert items["S.tokens"].tolist() == [4, 5, 2, 2, 4, 3]  # all of the story, and no EOS
    assert results["made"]["sstorycloze"]["notes"]["span"] == "whole"


def test_stories_in_four_settings(world):
    world.write(story_files("tstorycloze"))
    written, spoken = [], []
    for _, right, wrong in STORIES.values():
        written.append(better(world.score(" " + right[0])[1], world.score(" " + wrong[0])[1]))
        spoken.append(better(world.score(units=right[1])[1], world.score(units=wrong[1])[1]))
    results, items = world.run("tstorycloze")
    assert items["T.right"].tolist() == items["S->T.right"].tolist() == written and written[1] == 0.5
    assert items["S.right"].tolist() == items["T->S.right"].tolist() == spoken and spoken != written
    assert [result["items"] for result in results["tstorycloze"].values()] == [3, 3, 3, 3]
    config, encode = world.known.config, world.tokenizer.encode
    units = [config.vocab_size + u for u in (1, 2, 3)]
    assert (0, *encode("A bear slept."), *encode(" It")) in world.known.seen
    assert (0, *encode("A bear slept."), config.switch, config.vocab_size + 4) in world.known.seen
    assert (config.speech_eos, *units, config.switch, *encode(" It was")) in world.known.seen
    assert (config.speech_eos, *units, config.vocab_size + 4) in world.known.seen
    assert our_row(world)[5:9] == [f"**{100 * np.mean(x):.1f}**" for x in (written, spoken, spoken, written)]


def test_options_of_stories(world):
    world.write(story_files("tstorycloze"))
    _, items = world.run("tstorycloze", "--protocol.tstorycloze.span=whole")
    whole = [len(world.tokenizer.encode(context[0])) + len(ending[1].split())
             for context, *endings in STORIES.values() for ending in endings]
    assert items["T->S.tokens"].tolist() == whole  # the switch token is not scored
    world.known.seen.clear()
    world.run("tstorycloze", "--protocol.tstorycloze.prefix=10")
    config = world.known.config
    units = [config.vocab_size + u for u in (1, 2, 3)]
    [prefixed] = {read for read in world.known.seen if read[11:] == (config.switch, *units)}
    assert prefixed[0] == 0  # text EOS and ten text tokens, the same ones for both endings
    assert (config.speech_eos, *units, units[0] + 3) in world.known.seen  # the setting S has no prefix


def test_a_folder_may_hold_one_modality_and_a_text_model_needs_no_sound(world):
    world.write(story_files("sstorycloze", (".txt",)))
    assert set(world.run("sstorycloze")[0]["sstorycloze"]) == {"T"}
    world.write(story_files("sstorycloze"))
    (world.folder / "speech.safetensors").unlink()
    assert set(world.run("sstorycloze")[0]["sstorycloze"]) == {"T"}
    world.write(story_files("tstorycloze", (".wav",)))
    with pytest.raises(SystemExit, match="tstorycloze: nothing here that a text model can score"):
        world.run("tstorycloze")
    with pytest.raises(SystemExit, match="sblimp needs speech, and this checkpoint has no speech.safetensors"):
        world.run("sblimp")


# ---------------------------------------------------------------------------------------------------------------------
# bad data

GOLD = "sblimp/syntactic/dev/gold.csv"
BAD_DATA = [
    ("blimp", {"blimp/a.jsonl": '{"sentence_good": "a"}'}, "a.jsonl:1: not an item of BLiMP .sentence_bad"),
    ("blimp", blimp_files([("a", " ", "f", "u")]), "u.jsonl:1: not an item of BLiMP .sentence_bad"),
    ("blimp", {"blimp/a.jsonl": "{"}, "a.jsonl:1: no readable json"),
    ("blimp", {"blimp/a.txt": ""}, "blimp: no .jsonl files"),
    ("mmlu", {"mmlu": as_csv(MMLU, [QUESTIONS[0], ("s", "q", "a", "", "c", "d", "A")])}, "item 2: not an item of MMLU"),
    ("mmlu", {"mmlu": as_csv(MMLU, [("s", "q", "a", "b", "c", "d", "AB")])}, "item 1: not an item of MMLU.* 'AB'"),
    ("mmlu", {"mmlu": as_csv(MMLU[:-7], [])}, "mmlu: no one column answer; it needs subject"),
    ("mmlu", {}, "mmlu: no such file or folder"),
    ("sblimp", sblimp_files(SPOKEN + SPOKEN[:1]), "gold.csv:10: a second row for .* or .'agreement'"),
    ("sblimp", sblimp_files(SPOKEN[:-1]), "gold.csv: missing the counterpart of .'agreement'"),
    ("sblimp", sblimp_files([(1, "A", "agreement", 2, "1")]), "gold.csv:2: not a row"),
    ("sblimp", {GOLD: sblimp_files(SPOKEN)[GOLD]}, "no wavs here"),
    ("sblimp", {GOLD: sblimp_files(SPOKEN)[GOLD], "sblimp/syntactic/dev/x000.wav": "1"}, "x037.wav: missing, though"),
    ("sblimp", {"sblimp/x": ""}, "no syntactic/dev or syntactic/test inside"),
    ("sstorycloze", {"sstorycloze/a_correct.wav": "1"}, "a_correct.wav: misnamed; story k is"),
    ("sstorycloze", {"sstorycloze/1_correct.wav": "1"}, "1_correct.wav: misnamed"),
    ("sstorycloze", {"sstorycloze/0_a_correct.wav": "1", "sstorycloze/0_b_correct.wav": "1"}, "0_b_correct.*misnamed"),
    ("sstorycloze", {"sstorycloze/0_correct.wav": "1"}, "0_correct.wav: missing its counterpart, number 1"),
    ("sstorycloze", {"sstorycloze/x": ""}, "sstorycloze: no wavs here"),
    ("tstorycloze", story_files("tstorycloze") | {"tstorycloze/fox_correct.txt": " \n"}, "fox_correct.txt: empty text"),
    ("tstorycloze", story_files("tstorycloze") | {"tstorycloze/a_mutual.wav": "1"}, "a_correct.wav: missing")]


@pytest.mark.parametrize("task, files, message", BAD_DATA, ids=[f"{task}: {m}" for task, _, m in BAD_DATA])
def test_bad_data_is_named(world, task, files, message):
    world.write(files)
    with pytest.raises(SystemExit, match=message):
        world.run(task)


@pytest.mark.parametrize("line, message", [
    ("--dtype=float16", "dtype=float16: choose float32 or bfloat16"), ("--out=x/y.json", "in an existing folder"),
    ("--out=y.md", "give the name of a .json file"), ("--versus=no.json", "versus=no.json: no such file"),
    ("--versus=nowhere", "nowhere: no checkpoint here"), ("--before=nowhere", "nowhere: no checkpoint here"),
    ("--text_span=[5]", "text_span=.*: give the fewest and the most"), ("--device=mps", "choose auto or cpu"),
    ("--protocol.blimp.ties=some", "protocol.blimp.ties=some: choose share or wrong or first"),
    ("--tasks=['swuggy']", "no task swuggy; choose among blimp"), ("--tasks=['mmlu']", "mmlu has no data; set --mmlu"),
    ("--librispeech=['nowhere']", "nowhere: no such file or folder; librispeech needs it")])
def test_settings_are_checked_before_anything_is_scored(tmp_path, monkeypatch, line, message):
    save_pretrained(tiny_model(), tmp_path)
    monkeypatch.setattr(evaluate, "from_pretrained", None)
    with pytest.raises(SystemExit, match=message):
        evaluate.main([f"--checkpoint={tmp_path}", "--device=cpu", line])


# ---------------------------------------------------------------------------------------------------------------------
# held-out data

def test_nll_per_unit_and_per_token(world, demo_folder):
    world.known.config.max_position_embeddings = 48  # so that documents are read in windows
    units = dict(n_units=30, rate=25, hash=json.loads((world.folder / "units.json").read_text())["hash"])
    rng = np.random.default_rng(0)
    spoken = [rng.integers(0, 30, n).tolist() for n in (3, 47, 48, 49, 200)]
    datasets.write_set(world.tmp / "dev", "speech", spoken, units=units)
    results, items = world.run("librispeech", f"--librispeech=['{world.tmp / 'dev'}']")
    expected = [sum(nll_of(world.known.config.vocab_size + u) for u in document) for document in spoken]  # no EOS
    assert items["tokens"].tolist() == list(map(len, spoken)) and results["librispeech"]["documents"] == 5
    np.testing.assert_allclose(items["nll"], expected)
    assert results["librispeech"]["nll"] == pytest.approx(sum(expected) / sum(map(len, spoken)))
    assert max(map(len, world.known.seen)) == 48
    results, _ = world.run("text", f"--text=['{demo_folder / 'val'}']")  # a paired set, by its text
    val = datasets.open_set(demo_folder / "val")
    mean = np.mean([nll_of(int(token)) for token in val.text if token != 0])
    assert results["text"]["nll"] == pytest.approx(mean, rel=1e-6)
    assert results["text"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)


def test_topic_cloze_counts_and_layout(tmp_path):
    """The model likes some tokens, so every answer is known: right, right, wrong, a tie."""
    def document(text, units):
        return [[t] for t in text], [[u] for u in units]
    opening = document([1, 2], [1, 2])
    right = [opening, document([30, 31], [3, 4]), document([40, 30, 41], [5, 6, 5])]
    documents = [*right, *right, opening, document([40, 41], [6, 6]), document([30], [3]),
                 opening, document([30], [3]), document([31, 31], [3, 4])]
    tokenizer = SimpleNamespace(vocab_size=V, eos=0, hash="t")
    datasets.write_set(tmp_path / "cloze", "paired", documents, tokenizer, dict(n_units=UNITS, rate=25, hash="u"))
    liked, cloze_set = torch.tensor([30, 31, 53, 54]), datasets.open_set(tmp_path / "cloze")
    known = Known(TINY, lambda targets: torch.where(torch.isin(targets, liked), 1.0, 3.0))
    answers = evaluate.topic_cloze(known, cloze_set)
    results = report.cloze_table(report.cloze_sums(answers))
    assert list(results) == ["T", "S", "T->S", "S->T"]
    for setting, result in results.items():
        assert answers[setting].tolist() == [1, 1, 0, 0.5]
        assert result["accuracy"] == pytest.approx(62.5) and result["items"] == 4
        assert result["stderr"] == pytest.approx(100 * np.std([1, 1, 0, 0.5]) / 4 ** 0.5)
    assert evaluate.topic_cloze(known, cloze_set, items=[3, 1])["S->T"].tolist() == [0.5, 1]
    assert len(evaluate.topic_cloze(known, cloze_set, items=[])["T"]) == 0
    assert evaluate.topic_cloze(known, cloze_set, stop=["SIGTERM"]) == {}
    assert {(0, 1, 2, 30), (60, 51, 52, 53)} <= known.seen  # no switch token inside one modality
    assert {(0, 1, 2, 61), (60, 51, 52, 61)} <= known.seen


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


def test_versus(world, monkeypatch):
    """The second model is scored too, or its results are read. Both must be scored in the same way."""
    world.write(blimp_files(PAIRS))
    ours = world.run("blimp")[1]["right"]
    models = {"model": world.known, "other": Known(world.known.config, lambda targets: 4 - nll_of(targets))}
    monkeypatch.setattr(evaluate, "from_pretrained", lambda path: models[path.name])
    shutil.copytree(world.folder, world.tmp / "other")
    results, _ = world.run("blimp", f"--versus={world.tmp / 'other'}")
    theirs = np.load(world.tmp / "e.versus.items/blimp.right.npy")
    found = results["versus"]["scores"]["blimp"]
    assert found["difference"] == pytest.approx(100 * (ours - theirs).mean()) and 0 < found["p"] <= 1
    again, _ = world.run("blimp", f"--versus={world.tmp / 'e.versus.json'}")
    assert again["versus"]["scores"] == results["versus"]["scores"]
    for options, message in ((["--protocol.blimp.score=mean"], "blimp has other protocol"),
                             ([f"--versus={world.tmp / 'blimp/results.json'}"], "no results of evaluate.py")):
        world.write({"blimp/results.json": "{}"})
        with pytest.raises(SystemExit, match=message):
            world.run("blimp", f"--versus={world.tmp / 'e.versus.json'}", *options)


def test_table_7_is_the_papers():
    header, *rows = (line.split(";") for line in report.TABLE_7.read_text(encoding="utf-8").splitlines())
    assert len(header) == 14 and {len(row) for row in rows} == {14} and len(rows) == 23
    ours = next(row for row in rows if row[:3] == ["SmolTolk-150M", "150M", "16B"])
    assert ours[3:] == "79.4 58.0 88.4 82.0 75.2 81.0 64.1 55.0 58.8 58.4".split() + ["30.0 / 30.2"]


# ---------------------------------------------------------------------------------------------------------------------
# with sound and with two processes

def test_units_are_kept_by_content_not_by_place(tmp_path, monkeypatch):
    heard = []  # whether autocast was on: units are made in fp32

    class Units:
        hash = "h"

        def encode(self, waves):
            heard.append(torch.is_autocast_enabled("cpu"))
            return [(np.full(wave, wave, np.uint16), None) for wave in waves]

    monkeypatch.setattr("speech.units.load_units", lambda *_: Units())
    monkeypatch.setattr("speech.audio.read_audio", lambda path: int(Path(path).read_text()))

    def units_in(*files, made_with=(None, "h")):
        options = SimpleNamespace(cache=str(tmp_path / "cache"), units="u")
        evaluator = SimpleNamespace(settings=options, used=[], made_with=made_with, model=MODELS["smoltolk"],
                                    world=ALONE)
        with torch.autocast("cpu", torch.bfloat16):
            return hear.hear_files(evaluator, list(files))

    for name, n in (("x/1", 3), ("y/0", 2), ("flat/1", 3), ("flat/0", 2), ("flat/empty", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.wav").write_text(str(n))
    flat = [tmp_path / "flat/0.wav", tmp_path / "flat/1.wav"]
    assert units_in(tmp_path / "x/1.wav", tmp_path / "y/0.wav") == [[V + 3] * 3, [V + 2] * 2]
    with pytest.raises(ValueError, match="u: units h, the model has g"):
        units_in(*flat, made_with=(None, "g"))
    with pytest.raises(ValueError, match="empty.wav: too short for a single unit"):
        units_in(tmp_path / "flat/empty.wav")
    assert heard == [False, False]
    monkeypatch.setattr(Units, "encode", None)  # from here on, only what was kept can be used
    assert units_in(*flat) == [[V + 2] * 2, [V + 3] * 3]
    for kept in (tmp_path / "cache").glob("*.npy"):
        np.save(kept, np.array([1, 2, 3, UNITS, 4], np.uint16))  # the units of one file are missing
    with pytest.raises(ValueError, match="not the units of these files; remove it, they will be made again"):
        units_in(*flat)


def test_spoken_pairs_under_hiss(tmp_path):
    """Only the speakers that are named are used. Both sentences of a pair are as loud against their hiss."""
    soundfile = pytest.importorskip("soundfile")
    from corpora import demo
    from studies.small import spoken_blimp

    for name, lines in blimp_files(PAIRS * 3).items():
        (tmp_path / "blimp").mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines)
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


def test_two_processes_score_as_one(world, demo_folder, monkeypatch):
    """All kinds of tasks on real sound, also with torchrun: the same scores, and the same units in the cache."""
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.undo()
    shutil.rmtree(world.folder)
    model = tiny_model(vocab_size=world.tokenizer.vocab_size, n_units=30, max_position_embeddings=2048)
    save_pretrained(model, world.folder)
    for file in ("tokenizer.json", "units/units.json"):
        shutil.copy(demo_folder / file, world.folder)
    world.write(blimp_files(PAIRS * 3) | {"mmlu.csv": as_csv(MMLU, QUESTIONS * 3)} | sblimp_files(SPOKEN))
    for i, wav in enumerate(sorted((world.tmp / "sblimp/syntactic/dev").glob("*.wav"))):
        shutil.copy(demo_folder / f"wavs/{i % 4}.wav", wav)
    arguments = [f"--checkpoint={world.folder}", f"--blimp={world.tmp / 'blimp'}", "--device=cpu",
                 f"--mmlu={world.tmp / 'mmlu.csv'}", f"--sblimp={world.tmp / 'sblimp'}", "--batch_tokens=200",
                 f"--units={demo_folder / 'units'}", f"--cloze={demo_folder / 'cloze'}", "--sequence_length=32",
                 f"--val_text=['{demo_folder / 'val'}']", "--val_speech=[]", "--val_interleaved=[]",
                 "--val_sequences=9"]
    evaluate.main([*arguments, f"--out={world.tmp / 'one.json'}", f"--cache={world.tmp / 'cache1'}"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
               str(ROOT / "evaluate.py"), *arguments, f"--out={world.tmp / 'two.json'}",
               f"--cache={world.tmp / 'cache2'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((world.tmp / f"{name}.json").read_text()) for name in ("one", "two"))
    assert set(one["made"]) == {"blimp", "mmlu", "sblimp", "topic_cloze", "nll"} and two["processes"] == 2
    for task, made in one["made"].items():
        assert made["files"] == two["made"][task]["files"]
        for name in made["items"]:
            a, b = (np.load(report.item_path(world.tmp / f"{x}.json", task, name)) for x in ("one", "two"))
            np.testing.assert_allclose(b, a, rtol=1e-6, err_msg=f"{task} {name}")
    assert one["nll"]["text"]["text"] == pytest.approx(two["nll"]["text"]["text"], rel=1e-6)
    [kept1], [kept2] = ([*(world.tmp / cache).iterdir()] for cache in ("cache1", "cache2"))
    assert kept1.name == kept2.name and kept1.read_bytes() == kept2.read_bytes()
    soundfile.write(next((world.tmp / "sblimp/syntactic/dev").glob("*.wav")), np.zeros(100), 16000)
    with pytest.raises(SystemExit, match="wav: too short for a single unit"):  # not what was kept of another sound
        evaluate.main([*arguments, "--tasks=['sblimp']", f"--cache={world.tmp / 'cache1'}"])
