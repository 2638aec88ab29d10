"""bench.py: every part on a model that takes seconds, and what its numbers rest on."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import bench
import data
import evaluate
import train
from model import Config, SmolTolk, count_parameters

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=400, n_units=20, sequence_length=64, micro_batch=3, steps=1, warmup=0, device="cpu",
            dtype="float32")
HOOK = """
import torch
def build(config, device):
    return torch.nn.Embedding(config.switch + 1, 4, device=device), []
def step(state, tokens):
    table, seen = state
    assert tokens.shape == (3, 65) and tokens.dtype == torch.int64 and int(tokens.max()) < len(table.weight)
    table(tokens).sum().backward()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "read_rate", lambda device: 1e10)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(train, "reuse_memory", lambda: None)


def run(tmp_path, **more):
    bench.main([f"--{key}={value}" for key, value in (TINY | dict(out=tmp_path / "bench.json") | more).items()])
    return json.loads((tmp_path / "bench.json").read_text())


def test_training_steps_of_all_sides(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "hook.py").write_text(HOOK)
    report = run(tmp_path, what="train", pair="residual=false sequence_length=32", reference=True, profile=True,
                 hook=tmp_path / "hook.py")
    assert list(report["train"]) == ["text", "speech", "interleaved", "mixed", "stage 1"]
    for row, sides in report["train"].items():
        others = [] if row == "stage 1" else ["transformers", "hook"]
        assert [side for side in sides if side != "top ten"] == ["this", "pair", *others]
        for side in ["this", "pair", *others]:
            length = 32 if side == "pair" else 64
            assert sides[side]["tokens_per_second"] * sides[side]["seconds"] == pytest.approx(3 * length)
        assert sides["this"]["flops"] > sides["pair"]["flops"] > 0
    assert len(report["train"]["mixed"]["top ten"]) == 10
    assert json.loads((tmp_path / "bench.trace.json").read_text())["traceEvents"]
    page = capsys.readouterr().out
    assert "mixed, transformers" in page and len(page.splitlines()) < 60


def test_the_other_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BIG", 10**6)
    parts = "score,generate,data,memory"
    report = run(tmp_path, what=parts)
    for part in parts.split(","):
        assert all(value > 0 for value in report[part].values()), part
    assert report["generate"]["bound_per_second"] == pytest.approx(1e10 / report["generate"]["weight_bytes"])
    assert not (ROOT / "out" / "default").exists()


def test_every_size_finds_its_shape():
    for size, millions in (("150m", 149), ("400m", 402), ("2b", 1981)):
        argv = [f"config/train_{size}.py", "--sequence_length=64", "--compile=false"]
        settings, name = bench.configure(train.DEFAULTS | bench.OWN, argv, train.complete_stages)
        c = bench.prepare(settings, name, evaluate.ALONE)
        assert bench.bench_memory(c, evaluate.ALONE)["parameters"] == pytest.approx(millions * 1e6, rel=0.004)


def test_random_sets_are_sound(tmp_path):
    folder = bench.random_set(tmp_path / "set", Config(vocab_size=400, n_units=20), words=20_000)
    opened = data.open_set(folder, full=True)
    assert opened.meta["text"]["tokens"] / 20_000 == pytest.approx(1.3, abs=0.02)
    assert opened.meta["speech"]["tokens"] / 20_000 == pytest.approx(5, abs=0.1)
    assert len(np.unique(opened.text)) == 400


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_compiled_steps_meet_one_number_of_text_rows(tmp_path, rows):
    config = Config(vocab_size=400, n_units=20)
    shard = data.open_source("interleaved", [bench.random_set(tmp_path / "set", config, words=20_000)])
    c = SimpleNamespace(batch_tokens=64 * rows, sequence_length=64, micro_batch=rows, seed=3, text_span=(10, 30),
                        speech_span=(5, 15), compile=True)
    mixture = dict(text=1, speech=1, interleaved=1)
    make = train.step_batches(c, config, dict.fromkeys(mixture, shard), dict(mixture=mixture), 0, evaluate.ALONE)
    batches = [batch for step in range(6) for batch in make(step)]
    assert {batch.text_rows for batch in batches} == {rows // 3}
    assert all((batch.tokens[:rows // 3] < 400).all() for batch in batches)


MEASURE = """
import ctypes, sys, torch
import bench, evaluate, train
from pathlib import Path
def resident():
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)  # what is freed may stay resident, or may not
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
settings, name = bench.configure(train.DEFAULTS | bench.OWN, sys.argv[1:], train.complete_stages)
c = bench.prepare(settings, name, evaluate.ALONE)
told = bench.bench_memory(c, evaluate.ALONE)
model = bench.build_model(c, evaluate.ALONE)
rows, length = c.micro_batch, c.sequence_length
ids = torch.randint(0, c.vocab_size, (rows, length + 1))
ids[rows // 3:] = torch.randint(c.vocab_size, c.vocab_size + c.n_units, ids[rows // 3:].shape)
model(ids[:1, :9], ids[:1, 1:10])
before = resident()
out = model(ids[:, :-1], ids[:, 1:], rows // 3)
print(told["activations"], resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_a_forward_pass_leaves_behind():
    shape = TINY | dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
                        num_hidden_layers=4, sequence_length=256, micro_batch=9)
    done = subprocess.run([sys.executable, "-c", MEASURE, *(f"--{k}={v}" for k, v in shape.items())], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, measured = map(int, done.stdout.split())
    assert told == pytest.approx(measured, rel=0.15)


def test_frozen_gradients_are_neither_made_nor_sent(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for what in ("new", "all"):
            model, sent = SmolTolk(Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=2, num_key_value_heads=1, n_units=10)), []
            train.set_trainable(model, what)
            runner = train.make_runner(model, SimpleNamespace(compile=False, recompute=False), evaluate.ALONE)

            def count(_, bucket, sent=sent):
                sent.append(bucket.buffer().nbytes)
                reduced = dist.all_reduce(bucket.buffer(), async_op=True)
                return reduced.get_future().then(lambda done: done.value()[0])
            runner.register_comm_hook(None, count)
            ids = torch.randint(0, 60, (3, 20))
            out = runner(ids[:, :-1], ids[:, 1:])
            (out.text_nll + out.speech_nll + out.negative_entropy).backward()
            text, new = count_parameters(model)
            assert sum(sent) == 4 * (new if what == "new" else text + new)
            made = {name.startswith("model.") for name, p in model.named_parameters() if p.grad is not None}
            assert made == ({False} if what == "new" else {False, True})
    finally:
        dist.destroy_process_group()


def test_what_is_sent_in_a_step_of_several_micro_batches(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    ddp = run(tmp_path, what="ddp", micro_batches=3, warmup=1)["ddp"]
    text, new = count_parameters(SmolTolk(Config(**{k: v for k, v in TINY.items() if k in Config.__annotations__})))
    for stage, parameters in (("stage1", new), ("stage2", text + new)):  # from the second step on, buckets are final
        assert ddp[f"{stage}_sent_bytes"] == 4 * parameters and ddp[f"{stage}_parameters"] == parameters
        assert ddp[f"{stage}_all_reduces"] == ddp[f"{stage}_buckets"]  # only the last micro-batch sends
        for key in ("step", "step_unsummed", "sums_alone"):
            assert ddp[f"{stage}_{key}_seconds"] > 0


@pytest.mark.parametrize("more, message", [
    (dict(what="trian"), "what=trian: 'trian' is none of train, score"),
    (dict(what="ddp"), "what=ddp: one process sends nothing; start bench.py by torchrun"),
    (dict(steps=0), "steps, micro_batches: give 1 or more"),
    (dict(pair="residul=false"), "no setting residul; did you mean residual"),
    (dict(hook="nowhere.py", what="train"), "nowhere.py: cannot be used .*give a file with build"),
    (dict(init_from="weights/gpt2"), "weights/gpt2: no such folder, and no shape known")])
def test_bad_settings_end_in_one_line(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stop:
        run(tmp_path, **more)
    assert "\n" not in str(stop.value)
