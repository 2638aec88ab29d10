"""tools/bench.py: every part on a model that takes seconds, and what its numbers rest on."""
import json
import re
from contextlib import nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from data import micro_batches, open_source
from model import count_parameters
from runtime.distributed import ALONE
from tools import bench

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=400, n_units=20, sequence_length=64, micro_batch=3, steps=1, warmup=0, device="cpu",
            dtype="float32")


def arguments(**more):
    return [f"--{key}={value}" for key, value in (TINY | more).items()]


def prepare(*argv):
    settings, name = bench.configure(bench.DEFAULTS, argv, train.complete_stages)
    return bench.prepare(settings, name, ALONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "set"
    bench.write_random_set(folder, TINY["vocab_size"], TINY["n_units"])
    return folder


def test_every_part_is_timed(tmp_path, capsys, monkeypatch):
    """A mixed step is the mean over one step of each kind, because one sequence a step has room for one kind only."""
    pytest.importorskip("transformers")
    machine = dict.fromkeys(["float32", "bfloat16", "memory"], dict(flops=1e9, spread=[0.01], per_second=1e10))
    monkeypatch.setattr(bench, "measure_machine", lambda c, device: machine)
    monkeypatch.setattr(bench, "reuse_memory", lambda device: None)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "LARGE", 10**6)
    bench.main(arguments(out=tmp_path / "bench.json", pair="residual=false sequence_length=32", reference=True,
                         micro_batch=1))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert list(report["train"]) == ["text", "speech", "interleaved", "mixed", "stage 1"]
    for row, results in report["train"].items():
        assert list(results) == ["this", "pair"] + ["transformers"] * (row != "stage 1")
        for name, result in results.items():
            assert result["per_second"] * result["seconds"] == pytest.approx(32 if name == "pair" else 64)
        assert results["this"]["flops"] > results["pair"]["flops"] > 0
    kinds = [report["train"][kind]["this"]["flops"] for kind in ("text", "speech", "interleaved")]
    assert report["train"]["mixed"]["this"]["flops"] == pytest.approx(np.mean(kinds), rel=0.02)
    assert re.search(r"1e\+06 tokens, read-ahead (\d+ kB|not known), open and draw 32", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_step_is_that_of_the_training_loop(tmp_path, folder, name):
    c = prepare(*arguments(micro_batches=2, beta=1.0, out_dir=tmp_path / "run"))
    stage = c.stages[name] | dict(steps=3, learning_rate=1e-3, speech_learning_rate=1e-3, warmup=0, decay=0.0)
    c.stages = {name: stage}  # three steps, because at first the entropy is at its maximum and has no gradient
    before, timed, trained = (bench.make_model(c, ALONE) for _ in range(3))
    sources = dict.fromkeys(stage["mixture"], open_source("interleaved", [folder]))
    step_of_timed = bench.step_of_smoltolk(c, ALONE, timed, stage)
    for step in range(3):
        step_of_timed(micro_batches(step, sources, stage, 0, c, timed.config, ALONE))

    data = train.Data(None, sources, held={}, cloze=None, identity={}, files={})
    log, place = MagicMock(began=0.0), dict(stage=0, step=0, total=0, tokens=0, flops=0, seconds=0.0)
    train.train(train.Run(c, ALONE, data, {}, log, nullcontext(), [], None, []), trained, place)
    for old, a, b in zip(before.parameters(), timed.parameters(), trained.parameters()):
        torch.testing.assert_close(a, b)
        assert a.requires_grad or torch.equal(a, old)
    assert not torch.equal(timed.speech_embed.weight, before.speech_embed.weight)


def test_processes_send_only_what_is_trained_and_once_a_step(tmp_path, folder):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        c = prepare(*arguments(micro_batches=3))
        model = bench.make_model(c, ALONE)
        [batches] = bench.draw_steps(c, ALONE, c.stages["stage1"], model.config, folder)
        step = bench.step_of_smoltolk(c, ALONE, model, c.stages["stage1"])
        with torch.profiler.profile(record_shapes=True) as profiler:
            step(batches)
    finally:
        dist.destroy_process_group()
    sent = [event.input_shapes for event in profiler.events() if event.name == "gloo:all_reduce"]
    assert len(batches) == 3 and sum(n for [[n]] in sent) == count_parameters(model)[1]


@pytest.mark.parametrize("settings, message", [
    (dict(what="trian"), "what=trian: 'trian' is none of train, score"),
    (dict(init_from="weights/gpt2"), "weights/gpt2: no such folder, and no shape known")])
def test_bad_settings_end_in_one_line(tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message):
        bench.main(arguments(**settings))
