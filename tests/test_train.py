"""train.py and evaluate.py: stages, processes, resuming, and the final table."""
import contextlib
import json
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
from safetensors.torch import load_file

import checkpoint
import configurator
import data
import evaluate
import log
import report
import train
from model import Config, SmolTolk, from_pretrained

ROOT = Path(__file__).resolve().parent.parent
STAGES = dict(
    text=dict(steps=4, mixture=dict(text=1), train="text", learning_rate=3e-3, warmup=2),
    stage1=dict(steps=6, mixture=dict(interleaved=1), train="new", speech_learning_rate=3e-3),
    stage2=dict(steps=7, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=1e-3, decay=0.5))


def arguments(demo_folder, out, **more):
    """Command line of a run that takes seconds."""
    values = dict(
        out_dir=out, tokenizer=demo_folder / "tokenizer.json", units=demo_folder / "units",
        text=[str(demo_folder / "text")], speech=[str(demo_folder / "paired")],
        interleaved=[str(demo_folder / "paired")], cloze=demo_folder / "cloze", stages=STAGES, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        input_adapter_layers=1, output_adapter_layers=1, sequence_length=64, batch_tokens=64 * 12, micro_batch=12,
        beta=0.05, log_interval=1, eval_interval=5, eval_sequences=6, checkpoint_interval=5, keep_checkpoints=99,
        dtype="float32", device="cpu")
    values |= {f"val_{kind}": [str(demo_folder / "val")] for kind in ("text", "speech", "interleaved")}
    return [f"--{key}={value}" for key, value in (values | more).items()]


@pytest.fixture(scope="module")
def run(demo_folder, tmp_path_factory):
    """One whole undisturbed run in one process."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train.main(arguments(demo_folder, out))
    return out


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "speech.safetensors")


def losses(out):
    keys = ("text_nll", "speech_nll", "entropy", "grad_norm")
    return {(x["step"], k): x[k] for x in log.read_log(out) for k in keys if x.get(k) is not None}


def test_stages_train_what_they_say(run):
    ends = dict(text=4, stage1=10, stage2=17)
    ends = {name: weights(run / f"checkpoint-{step:08d}") for name, step in ends.items()}
    assert ends["text"].keys() == ends["stage2"].keys()
    for name in ends["text"]:
        backbone = name.startswith("model.")
        assert torch.equal(ends["text"][name], ends["stage1"][name]) == backbone, name  # stage 1: bit-equal backbone
        assert not torch.equal(ends["stage1"][name], ends["stage2"][name]), name
    config = from_pretrained(run / "checkpoint-00000004").config
    torch.manual_seed(1)
    fresh = SmolTolk(config).state_dict()
    for name, value in ends["text"].items():
        assert torch.equal(value, fresh[name]) != name.startswith("model."), name  # the text stage: the backbone alone


def test_what_a_run_leaves(run):
    lines = log.read_log(run)
    steps = [x for x in lines if "tokens" in x]
    assert [x["step"] for x in steps] == list(range(1, 18)) and steps[-1]["tokens"] == 17 * 64 * 12
    assert [x["stage"] for x in steps] == ["text"] * 4 + ["stage1"] * 6 + ["stage2"] * 7
    assert steps[-1]["text_nll"] < steps[0]["text_nll"]
    assert all(0 < x["entropy"] <= math.log(2) + 1e-6 for x in steps[4:])
    assert {x["step"] for x in lines if "nll" in x} == {4, 5, 10, 15, 17}
    results = json.loads((run / "results.json").read_text())
    assert list(results["topic_cloze"]) == ["T", "S", "T->S", "S->T"]
    assert all(set(x) == {"accuracy", "stderr", "items"} and x["items"] > 10 for x in results["topic_cloze"].values())
    assert set(results["nll"]["interleaved"]) == {"text", "speech"} and set(results["nll"]["text"]) == {"text"}
    assert (run / "loss.png").stat().st_size > 10_000
    assert json.loads((run / "settings.json").read_text())["stages"]["stage2"]["decay"] == 0.5


def test_resuming_is_exact(run, demo_folder, tmp_path):
    for step in (5, 10, 15):  # amid stage 1, at its end, amid stage 2
        out = tmp_path / str(step)
        shutil.copytree(run, out)
        for folder in out.glob("checkpoint-*"):
            if int(folder.name[11:]) > step:
                shutil.rmtree(folder)
        train.main(arguments(demo_folder, out, resume=True))
        again, first = weights(out / "checkpoint-00000017"), weights(run / "checkpoint-00000017")
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert losses(out) == losses(run)


def test_starting_from_a_text_model(run, demo_folder, tmp_path):
    """init_from: shape and weights of the backbone are the folder's, rope_theta and the switches are the settings'."""
    source = run / "checkpoint-00000004"
    folder = tmp_path / "llama"
    shutil.copytree(source, folder)
    for name in ("speech.safetensors", "optimizer.safetensors", "train.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["smoltolk"]  # now a plain Llama, as SmolLM is
    (folder / "config.json").write_text(json.dumps(config | dict(rope_theta=10_000.0, eos_token_id=2)))
    stages = dict(stage1=dict(steps=1, mixture=dict(interleaved=1), train="new", speech_learning_rate=1e-3))
    more = dict(init_from=folder, stages=stages, hidden_size=999, residual=False, rope_theta=50_000.0)
    train.main(arguments(demo_folder, tmp_path / "out", **more))
    model = from_pretrained(tmp_path / "out" / "checkpoint-00000001")
    assert (model.config.hidden_size, model.config.residual, model.config.rope_theta) == (32, False, 50_000.0)
    assert model.config.eos_token_id == 0  # the tokenizer's <|endoftext|>, whatever config.json says
    for name, value in load_file(source / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(SystemExit, match="llama: max_position_embeddings 2048; set --sequence_length=2048 or less"):
        train.build_model(SimpleNamespace(seed=1, init_from=folder, sequence_length=4096, n_units=30,
                                          vocab_size=model.config.vocab_size), SimpleNamespace(eos=0))


def torchrun(processes, argv):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
               str(ROOT / "train.py"), *argv]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)


def test_two_processes_do_what_one_does(run, demo_folder, tmp_path):
    done = torchrun(2, arguments(demo_folder, tmp_path / "two", micro_batch=4))  # and accumulate unevenly: 4 + 2
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(run), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=2e-5), key
    held = [[x for x in log.read_log(out) if "nll" in x] for out in (run, tmp_path / "two")]
    for a, b in zip(*held):
        assert log.flat(a["topic_cloze"]) == pytest.approx(log.flat(b["topic_cloze"]))
        assert log.flat(b["nll"]) == pytest.approx(log.flat(a["nll"]), rel=1e-4)
    first, second = weights(run / "checkpoint-00000017"), weights(tmp_path / "two" / "checkpoint-00000017")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=2e-5)


def test_global_batches_do_not_depend_on_the_processes(demo_folder):
    c = SimpleNamespace(batch_tokens=64 * 12, sequence_length=64, micro_batch=5, seed=3, text_span=(10, 30),
                        speech_span=(5, 15), compile=False)
    folder = demo_folder / "paired"
    sources = {k: data.open_source(k, [folder]) for k in ("text", "speech", "interleaved")}
    meta = data.open_set(folder).meta
    config = Config(vocab_size=meta["text"]["vocab_size"], n_units=30)
    whole = []
    for size in (1, 2, 3, 4, 6, 12):
        rows = []
        for rank in range(size):
            world = evaluate.World(rank, 0, size, torch.device("cpu"))
            stage = dict(mixture=dict(text=1, speech=1, interleaved=1))
            batches = train.step_batches(c, config, sources, stage, 2, world)(7)
            assert len(batches) == -(-12 // size // 5) or size == 1
            rows += [row for b in batches for row in b.tokens.tolist()]
        whole.append(sorted(rows))
    assert all(w == whole[0] for w in whole)


def test_schedule():
    stage = dict(steps=1000, warmup=100, decay=0.2)
    rates = [train.schedule(step, stage) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1 and rates[49] == pytest.approx(0.5)
    assert set(rates[99:801]) == {1.0} and rates[900] == pytest.approx(0.5) and rates[999] == pytest.approx(0.005)
    assert {train.schedule(step, dict(steps=9, warmup=0, decay=0.0)) for step in range(9)} == {1.0}


def test_weight_decay_on_matrices_only():
    model = SmolTolk(Config(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2, num_key_value_heads=1, n_units=5))
    settings = SimpleNamespace(weight_decay=0.1, beta1=0.9, beta2=0.95)
    optimizer = train.make_optimizer(model, settings, torch.device("cpu"))
    names = {p: n for n, p in model.named_parameters()}
    decayed = {names[p] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    assert decayed == {n for n in names.values() if not n.endswith(("norm.weight", "bias", "phi"))}
    for group in optimizer.param_groups:  # phi and the selector learn at the new modules' rate, not the backbone's
        assert all(names[p].startswith("model.") != group["new"] for p in group["params"])


@pytest.mark.parametrize("more, message", [
    (dict(batch_tokens=64 * 12 + 1), "batch_tokens=769 is not a whole number of sequences of 64"),
    (dict(stages=dict(s=dict(steps=1, mixture=dict(text=1), warmpu=1))), "stages.s.warmpu.*did you mean warmup"),
    (dict(stages=dict(s=dict(steps=1, mixture=dict(video=1)))), "stages.s.mixture: video=1"),
    (dict(text=[]), "^text: no data set named"),
    (dict(text=["nowhere"]), "nowhere: no data set here"),
    (dict(cloze="nowhere"), "nowhere: no data set here"),
    (dict(sequence_length=2048, batch_tokens=2048), "tokens, fewer than a sequence of 2049"),
    (dict(n_units=29), "n_units=29: .*units.json has 30"),
    (dict(eval_interval=0), "eval_interval=0: give 1 or more"),
    (dict(grad_clip=0), "grad_clip=0.0: give a positive norm"),
    (dict(units="", n_units=29), ": 30 units, the model has 29; set --units"),
    (dict(beta1=1), "beta1=1.0, .*: from 0 to less than 1"),
    (dict(seed=1 << 64), "seed=18446744073709551616: .*a seed of 0 or more"),
    (dict(beta="1e999"), "beta=inf: give a finite number"),
    (dict(wandb_project="x"), "wandb is not installed: pip install wandb"),
    (dict(text_span=["a", "b"]), "text_span=.*: give the least and the most"),
    (dict(stages=dict(s=dict(steps=1, mixture=dict(text=1), speech_learning_rate=-1))), "learning rates of 0 or more"),
    (dict(input_adapter_layers=-1), "input_adapter_layers=-1: give 0 or more"),
    (dict(text_span=[30, 10]), r"text_span=\[30, 10\]: give the least and the most"),
    (dict(stages={}), "stages: empty"),
    (dict(stages=dict(s=5)), "stages.s=5: a stage is a dict"),
    (dict(stages=dict(s=dict(steps=1.5))), "stages.s.steps is 1.5"),
    (dict(stages=dict(s=dict(steps=0, mixture=dict(text=1)))), "stages.s: give steps of 1 or more"),
    (dict(device="cdua"), "device=cdua: choose auto"),
    (dict(resume=True), "no checkpoint to go on from"),
    (dict(units="nowhere"), "nowhere/units.json: cannot be read"),
    (dict(tokenizer="nowhere.json"), "nowhere.json: not a readable tokenizer.json"),
    (dict(dtype="float8"), "dtype=float8"),
    (dict(init_from="nowhere"), "nowhere/config.json: no such file"),
    (dict(layer_pooling="mean"), "layer_pooling='mean'"),
    (dict(vocab_size=100), "vocab_size=100 cannot hold")])
def test_bad_settings_end_in_one_line(demo_folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stop:
        train.main(arguments(demo_folder, tmp_path / "out", **more))
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_a_cloze_set_that_cannot_be_scored_is_refused_first(demo_folder, tmp_path):
    good = data.open_set(demo_folder / "cloze")
    train.check_cloze(good, 2048)
    longest = max(len(x) for i in range(0, good.meta["documents"], 3) for j in (1, 2)
                  for x in (np.append(good.document(i)[1][:-1], good.document(i + j)[1]),))
    train.check_cloze(good, longest + 1)
    with pytest.raises(SystemExit, match=f"empty, or longer with its ending than the {longest - 1} positions"):
        train.check_cloze(good, longest - 1)
    for wrong in ("text", "paired"):
        with pytest.raises(SystemExit, match="paired set with its documents in threes"):
            one_more = good._replace(meta=good.meta | dict(documents=good.meta["documents"] + 1))
            train.check_cloze(one_more if wrong == "paired" else data.open_set(demo_folder / wrong), 2048)


def test_what_is_only_looked_at_may_change():
    was = {"text[0]": ["a", 1.0, "here"], "val_text[0]": ["b", 1.0, "here"], "cloze[0]": ["c", 1.0, "here"]}
    now = {key: [digest + "!", *rest] for key, (digest, *rest) in was.items()}
    refused, changed = checkpoint.differences(dict(settings={}, data=was, made={}),
                                              dict(settings={}, data=now, made={}), set())
    assert list(refused) == ["text[0]"] and sorted(changed) == ["cloze[0]", "val_text[0]"]


def test_gradients_are_the_buckets_that_are_sent(tmp_path):
    """In no micro-batch does a second copy of them lie beside."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, world = tiny_model(), evaluate.World()
        c = SimpleNamespace(recompute=False, compile=False, beta=0.0, grad_clip=1.0, weight_decay=0.1, beta1=0.9,
                            beta2=0.95)
        train.set_trainable(model, "new")
        optimizer = train.make_optimizer(model, c, world.device)
        runner = train.make_runner(model, c, world)
        seen = []
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.data_ptr()))
        rows = np.random.default_rng(0).integers(0, 61, (4, 20))
        batches = [data.make_batch(rows[i:i + 2], 0, model.config) for i in (0, 2)]
        for _ in range(3):
            train.train_step(runner, optimizer, batches, c, world, contextlib.nullcontext())
        assert seen[0] == seen[1] and len(set(seen[2:])) == 1  # after the first step the buckets are made once more
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_goes_on_only_as_it_began(run, demo_folder):
    with pytest.raises(SystemExit, match="was trained with layer_pooling='dynamic', not 'last'; resume with the same"):
        train.main(arguments(demo_folder, run, resume=True, layer_pooling="last"))


def test_a_run_is_never_overwritten(run, demo_folder):
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit, match="holds a run already; go on with --resume=true"):
        train.main(arguments(demo_folder, run))
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_sound(config):
    settings, name = configurator.configure(train.DEFAULTS, [str(config)], train.complete_stages)
    c = train.check_settings(settings, name, evaluate.World(0, 0, 4, torch.device("cpu")))
    assert c.out_dir == f"out/{config.stem}"
    parts = [c.input_adapter_layers, c.output_adapter_layers, c.layer_pooling, c.residual]
    expected = [2, 2, "dynamic", True]
    expected = {"baseline": [0, 0, "last", False], "baseline_deep": [0, 0, "last", False],
                "no_dynamic_pooling": [2, 2, "fixed", True],
                "no_layer_pooling": [2, 2, "last", True], "no_input_adapter": [0, 2, "dynamic", True],
                "no_output_adapter": [2, 0, "dynamic", True], "no_adapters": [0, 0, "dynamic", True],
                "no_residual": [2, 2, "dynamic", False]}.get(name.removeprefix("ablation_").rsplit("_", 1)[0], expected)
    assert parts == expected
    if name.endswith(("m", "b")):  # the sizes of Section 4.1
        stages, tokens = c.stages, c.batch_tokens * sum(s["steps"] for s in c.stages.values())
        assert c.batch_tokens == 2**20 and c.rope_theta == 100_000 and c.sequence_length == 2048
        assert tokens == pytest.approx(32e9 if name == "train_2b" else 16e9, rel=1e-3)
        assert list(stages) == (["stage2"] if "baseline" in name else ["stage1", "stage2"])
        assert stages["stage2"]["learning_rate"] == (1e-4 if name == "train_2b" else 3e-4)
        if "stage1" in stages:
            assert stages["stage1"]["speech_learning_rate"] == pytest.approx(10 * stages["stage2"]["learning_rate"])
        assert c.beta == (0.01 if "400m" in name and "pooling" not in name or name == "train_2b" else 0)


# evaluate.py

def tiny_model():
    torch.manual_seed(0)
    return SmolTolk(Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, n_units=10, initializer_range=0.2)).eval()


def test_scores_alone_and_in_a_batch():
    model, rng = tiny_model(), np.random.default_rng(0)
    sequences, spans = [], []
    for _ in range(40):
        n = int(rng.integers(3, 60))
        sequences.append(list(rng.choice([0, 7, 20, 49, 50, 55, 60, 61], n)))
        a = int(rng.integers(1, n))
        spans.append((a, int(rng.integers(a + 1, n + 1))))
    together, count = evaluate.log_likelihood(model, sequences, spans, batch_tokens=300)
    for i, (sequence, (a, b)) in enumerate(zip(sequences, spans)):
        alone, its_count = evaluate.log_likelihood(model, [sequence], [(a, b)])
        assert together[i] == pytest.approx(alone[0], abs=1e-4) and count[i] == its_count[0]
        with torch.no_grad():
            out = model(torch.tensor([sequence]), logits=slice(None))
        text, speech = out.text_logits[0].log_softmax(-1), out.speech_logits[0].log_softmax(-1)
        by_hand = [text[t - 1, sequence[t]] if sequence[t] < 50 else speech[t - 1, sequence[t] - 50]
                   for t in range(a, b) if sequence[t] != 61]
        assert together[i] == pytest.approx(float(sum(by_hand)), abs=1e-4) and count[i] == len(by_hand)


class Oracle:
    """Stands in for the model: knows which tokens are likely, so that every answer is known beforehand."""
    config = Config(vocab_size=50, n_units=10)

    def __init__(self, liked):
        self.liked, self.seen = liked, []

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, ids, targets, text_rows, want, tree):
        for row, parents in zip(ids.tolist(), tree.parent.tolist()):
            ways = []
            for token, parent in zip(row, parents):
                ways.append([*(ways[parent] if parent < len(ways) else ()), token])
            self.seen += ways
        logp = torch.where(torch.isin(targets, torch.tensor(self.liked)), -1.0, -3.0)
        return SimpleNamespace(logp=logp * (targets >= 0))


def test_topic_cloze_counts_and_layout(tmp_path):
    tokenizer = SimpleNamespace(vocab_size=50, eos=0, hash="t")

    def document(text, units):
        return [[t] for t in text], [[u] for u in units]
    right = [document([1, 2], [1, 2]), document([30, 31], [3, 4]), document([40, 30, 41], [5, 6, 5])]
    documents = [*right, *right,
                 document([1, 2], [1, 2]), document([40, 41], [6, 6]), document([30], [3]),  # wrong
                 document([1, 2], [1, 2]), document([30], [3]), document([31, 31], [3, 4])]  # a tie: means are equal
    data.write_set(tmp_path / "cloze", "paired", documents, tokenizer, dict(n_units=10, rate=25, hash="u"))
    oracle = Oracle(liked=[30, 31, 53, 54])
    answers = evaluate.topic_cloze(oracle, data.open_set(tmp_path / "cloze"))
    results = report.cloze_table(report.cloze_sums(answers))
    for setting in ("T", "S", "T->S", "S->T"):
        assert answers[setting].tolist() == [1, 1, 0, 0.5]
        assert results[setting]["accuracy"] == pytest.approx(62.5) and results[setting]["items"] == 4
        assert results[setting]["stderr"] == pytest.approx(100 * np.std([1, 1, 0, 0.5]) / 4 ** 0.5)
    some = evaluate.topic_cloze(oracle, data.open_set(tmp_path / "cloze"), items=[3, 1])
    assert some["S->T"].tolist() == [0.5, 1] and len(evaluate.topic_cloze(oracle, data.open_set(tmp_path / "cloze"),
                                                                          items=[])["T"]) == 0
    starts = {tuple(way[:4]) for way in oracle.seen}
    assert (0, 1, 2, 30) in starts and (60, 51, 52, 53) in starts  # no switch token inside one modality
    assert (0, 1, 2, 61) in starts and (60, 51, 52, 61) in starts


def test_evaluate_gives_the_table_of_the_run(run, demo_folder, capsys, monkeypatch, tmp_path):
    sets = [f"--val_{kind}={[str(demo_folder / 'val')]}" for kind in ("text", "speech", "interleaved")]
    evaluate.main([f"--checkpoint={run}", f"--cloze={demo_folder / 'cloze'}", "--sequence_length=64", "--seed=1",
                   "--val_sequences=24", f"--out={tmp_path / 'e.json'}", "--device=cpu", *sets])
    ours, theirs = json.loads((tmp_path / "e.json").read_text()), json.loads((run / "results.json").read_text())
    assert log.flat(ours["nll"]) == pytest.approx(log.flat(theirs["nll"]), rel=1e-4)
    assert log.flat(ours["topic_cloze"]) == pytest.approx(log.flat(theirs["topic_cloze"]))
    with pytest.raises(SystemExit, match="no checkpoint here"):
        evaluate.main([f"--checkpoint={tmp_path}"])
