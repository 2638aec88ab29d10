"""bench.py: every part on a model that takes seconds, and what its numbers rest on."""
import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from data import micro_batches, open_source
from model import count_parameters
from runtime.datasets import open_set
from runtime.distributed import ALONE
from tools import bench

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=400, n_units=20, sequence_length=64, micro_batch=3, steps=1, warmup=0, device="cpu",
            dtype="float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "read_rate", lambda device: 1e10)
    monkeypatch.setattr(bench, "reuse_memory", lambda: None)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "LARGE", 10**6)


def arguments(**more):
    return [f"--{key}={value}" for key, value in (TINY | more).items()]


def run(tmp_path, **more):
    bench.main(arguments(**dict(out=tmp_path / "bench.json") | more))
    return json.loads((tmp_path / "bench.json").read_text())


def prepare(*argv):
    settings, name = bench.configure(bench.DEFAULTS, argv, train.complete_stages)
    return bench.prepare(settings, name, ALONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "set"
    bench.write_random_set(folder, TINY["vocab_size"], TINY["n_units"])
    return folder


def test_training_steps_of_all_sides(tmp_path, capsys):
    pytest.importorskip("transformers")
    report = run(tmp_path, what="train", pair="residual=false sequence_length=32", reference=True,
                 profile=tmp_path / "trace.json")
    assert list(report["train"]) == ["text", "speech", "interleaved", "mixed", "stage 1"]
    for row, sides in report["train"].items():
        assert list(sides) == ["this", "pair"] + ["transformers"] * (row != "stage 1")
        for side, result in sides.items():
            tokens = 3 * (32 if side == "pair" else 64)
            assert result["tokens_per_second"] * result["seconds"] == pytest.approx(tokens)
        assert sides["this"]["flops"] > sides["pair"]["flops"] > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    page, progress = capsys.readouterr()
    assert "mixed, transformers" in page and len(page.splitlines()) == 18
    assert "train: mixed, timed: this 0." in progress and "aten::mm" in progress


def test_the_other_parts(tmp_path, capsys):
    report = run(tmp_path, what="score,generate,data")
    for part in ("score", "generate", "data"):
        assert all(value > 0 for value in report[part].values()), part
    backbone, _ = count_parameters(train.build_model(prepare(*arguments()), SimpleNamespace(eos=0)))
    assert report["generate"]["weight_bytes"] == 4 * backbone
    assert report["generate"]["bound_per_second"] == pytest.approx(1e10 / (4 * backbone))
    assert "share of bound" in capsys.readouterr().out


def test_progress_is_shown_before_the_first_measurement(tmp_path, capsys, monkeypatch):
    def stop(c, world):
        raise KeyboardInterrupt
    monkeypatch.setattr(bench, "measure_machine", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert "machine: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_step_is_that_of_the_training_loop(tmp_path, folder, name):
    c = prepare(*arguments(micro_batches=2, beta=1.0, out_dir=tmp_path / "run"))
    stage = c.stages[name] | dict(steps=3, learning_rate=1e-3, speech_learning_rate=1e-3, warmup=0, decay=0.0)
    c.stages = {name: stage}  # in three steps, because at first the entropy is at its maximum and has no gradient
    before, timed, trained = (bench.make_model(c, ALONE) for _ in range(3))
    sources = dict.fromkeys(stage["mixture"], open_source("interleaved", [folder]))
    side = bench.smoltolk_side(c, ALONE, stage, timed, folder)
    for step in range(3):
        side.run(micro_batches(step, sources, stage, 0, c, timed.config, ALONE))

    data = train.Data(None, sources, held={}, cloze=None, identity={}, files={})
    log, place = MagicMock(began=0.0), dict(stage=0, step=0, total=0, tokens=0, flops=0, seconds=0.0)
    train.train(train.Run(c, ALONE, data, {}, log, nullcontext(), [], None, []), trained, place)
    for old, a, b in zip(before.parameters(), timed.parameters(), trained.parameters()):
        torch.testing.assert_close(a, b)
        assert a.requires_grad or torch.equal(a, old)
    assert not torch.equal(timed.speech_embed.weight, before.speech_embed.weight)
    assert place["flops"] == pytest.approx(3 * side.flops, rel=0.02)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_processes_send_only_what_is_trained_and_once_a_step(tmp_path, folder, name):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        c = prepare(*arguments(micro_batches=3))
        model = bench.make_model(c, ALONE)
        side = bench.smoltolk_side(c, ALONE, c.stages[name], model, folder)
        [batches] = side.steps
        with torch.profiler.profile(record_shapes=True) as profiler:
            side.run(batches)
    finally:
        dist.destroy_process_group()
    sent = [event.input_shapes for event in profiler.events() if event.name == "gloo:all_reduce"]
    text, new = count_parameters(model)
    assert len(batches) == 3 and sum(n for [[n]] in sent) == (new if name == "stage1" else text + new)


@pytest.mark.parametrize("size, millions", [("150m", 149), ("400m", 402), ("2b", 1981)])
def test_every_size_finds_its_shape(size, millions):
    c = prepare(f"config/train_{size}.py")
    with torch.device("meta"):
        model = train.build_model(c, SimpleNamespace(eos=0))
    assert sum(count_parameters(model)) == pytest.approx(millions * 1e6, rel=0.004)


def test_random_sets_are_sound(folder):
    opened = open_set(folder, full=True)
    words = opened.meta["words"]
    assert opened.meta["text"]["tokens"] / words == pytest.approx(1.3, abs=0.02)
    assert opened.meta["speech"]["tokens"] / words == pytest.approx(5, abs=0.1)
    assert len(np.unique(opened.text)) == 400 and len(np.unique(opened.speech)) == 21


@pytest.mark.parametrize("settings, message", [
    (dict(what="trian"), "what=trian: 'trian' is none of train, score"),
    (dict(steps=0), "steps, micro_batches: give 1 or more"),
    (dict(pair="residul=false"), "no setting residul; did you mean residual"),
    (dict(what="score", profile="trace.json"), "profile=trace.json: only training steps"),
    (dict(out="nowhere/bench.json"), "out=nowhere/bench.json: give the name of a file"),
    (dict(init_from="weights/gpt2"), "weights/gpt2: no such folder, and no shape known")])
def test_bad_settings_end_in_one_line(tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message) as stop:
        run(tmp_path, **settings)
    assert "\n" not in str(stop.value)
