"""train.py on one process: its settings, its stages, exact resuming, and what a run leaves."""
import dataclasses
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import sample
import train
from configurator import configure
from data import Batch
from model import Config, SmolTolk, from_pretrained, make_layout, save_pretrained, selector_entropy
from runtime.datasets import open_set
from runtime.distributed import ALONE, World
from runtime.log import flat, read_log

ROOT = Path(__file__).resolve().parent.parent
STAGES = dict(
    text=dict(steps=4, mixture=dict(text=1), train="text", learning_rate=3e-3, warmup=2),
    stage1=dict(steps=6, mixture=dict(interleaved=1), train="new", speech_learning_rate=3e-3),
    stage2=dict(steps=7, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=1e-3, decay=0.5))
TINY = Config(vocab_size=22, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, n_units=5)


def arguments(demo_folder, out, **more):
    """Command line of a run that takes seconds."""
    values = dict(
        out_dir=out, tokenizer=demo_folder / "tokenizer.json", units=demo_folder / "units",
        text=[str(demo_folder / "text")], speech=[str(demo_folder / "paired")],
        interleaved=[str(demo_folder / "paired")], cloze=demo_folder / "cloze", stages=STAGES, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        input_adapter_layers=1, output_adapter_layers=1, sequence_length=64, batch_tokens=64 * 12, micro_batch=12,
        beta=0.05, log_interval=1, eval_interval=5, eval_sequences=6, checkpoint_interval=5,
        keep_checkpoints=99, dtype="float32", device="cpu")
    values |= {f"val_{kind}": [str(demo_folder / "val")] for kind in ("text", "speech", "interleaved")}
    return [f"--{key}={value}" for key, value in (values | more).items()]


@pytest.fixture(scope="module")
def run(demo_folder, tmp_path_factory):
    """The folder of one whole run in one process."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train.main(arguments(demo_folder, out))
    return out


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "speech.safetensors")


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
    fresh = SmolTolk(config).start_new_modules("release").state_dict()
    for name, value in ends["text"].items():
        assert torch.equal(value, fresh[name]) != name.startswith("model."), name  # the text stage: the backbone alone


def test_what_a_run_leaves(run):
    lines = read_log(run)
    steps = [x for x in lines if "tokens" in x]
    assert [x["step"] for x in steps] == list(range(1, 18)) and steps[-1]["tokens"] == 17 * 64 * 12
    assert [x["stage"] for x in steps] == ["text"] * 4 + ["stage1"] * 6 + ["stage2"] * 7
    assert steps[-1]["text_nll"] < steps[0]["text_nll"]
    assert all(0 < x["entropy"] <= math.log(2) + 1e-6 for x in steps[4:])
    assert (run / "loss.png").stat().st_size > 10_000
    assert json.loads((run / "settings.json").read_text())["stages"]["stage2"]["decay"] == 0.5


def test_starting_from_a_text_model(run, demo_folder, tmp_path, capsys):
    """init_from: shape and weights of the backbone are the folder's, and so is rope_theta if no setting names one."""
    source, folder = run / "checkpoint-00000004", tmp_path / "llama"
    folder.mkdir()
    shutil.copy(source / "model.safetensors", folder)
    config = json.loads((source / "config.json").read_text())
    del config["smoltolk"]  # now a plain Llama, as SmolLM is
    (folder / "config.json").write_text(json.dumps(config | dict(rope_theta=10_000.0, eos_token_id=2)))
    stages = dict(stage1=dict(steps=1, mixture=dict(interleaved=1), train="new", speech_learning_rate=1e-3))
    more = dict(init_from=folder, stages=stages, hidden_size=999, residual=False, rope_theta=50_000.0)
    train.main(arguments(demo_folder, tmp_path / "out", **more))
    assert "rope_theta: 10000.0 -> 50000.0" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "out" / "checkpoint-00000001")
    assert (model.config.hidden_size, model.config.residual, model.config.rope_theta) == (32, False, 50_000.0)
    assert model.config.eos_token_id == 0  # the tokenizer's <|endoftext|>, whatever config.json says
    for name, value in load_file(source / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    train.main(arguments(demo_folder, tmp_path / "own", **more | dict(rope_theta=0)))
    assert "rope_theta" not in capsys.readouterr().out
    assert from_pretrained(tmp_path / "own" / "checkpoint-00000001").config.rope_theta == 10_000.0


def test_starting_from_a_model_with_more_ids_than_tokens(run, demo_folder, tmp_path):
    """Vocabularies are padded to multiples of 64. The remedy of the message works, and such ids are not drawn."""
    folder, more = tmp_path / "padded", dict(stages=dict(text=dict(steps=1, mixture=dict(text=1), train="text")))
    config = dataclasses.replace(from_pretrained(run / "checkpoint-00000004").config, vocab_size=1280)
    save_pretrained(SmolTolk(config), folder)
    (folder / "speech.safetensors").unlink()
    with pytest.raises(SystemExit, match="set --vocab_size=1280 ") as error:
        train.main(arguments(demo_folder, tmp_path / "out", init_from=folder, **more))
    assert "\n" not in str(error.value)
    train.main(arguments(demo_folder, tmp_path / "out", init_from=folder, vocab_size=1280, **more))
    checkpoint = tmp_path / "out" / "checkpoint-00000001"
    sample.main([f"--checkpoint={checkpoint}", "--temperature=1e4", "--max_new=100", "--device=cpu"])


def test_schedule():
    rates = [train.schedule(step, dict(steps=1000, warmup=100, decay=0.2)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1 and rates[49] == pytest.approx(0.5)
    assert set(rates[99:801]) == {1.0} and rates[900] == pytest.approx(0.5) and rates[999] == pytest.approx(0.005)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_on_matrices_only(name):
    model = SmolTolk(TINY)
    settings = SimpleNamespace(optimizer=name, weight_decay=0.1, beta1=0.9, beta2=0.95)
    optimizers = train.make_optimizers(model, settings)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    names = {p: n for n, p in model.named_parameters()}
    decayed = {names[p] for g in groups if g["weight_decay"] for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert decayed == {n for n in names.values() if not n.endswith(("norm.weight", "bias", "phi"))}
    for group in groups:  # phi and the selector learn at the new modules' rate, not the backbone's
        assert all(names[p].startswith("model.") != group["new"] for p in group["params"])
    by_muon = {names[p] for optimizer in optimizers if isinstance(optimizer, torch.optim.Muon)
               for group in optimizer.param_groups for p in group["params"]}
    assert by_muon == {n for n in names.values() if name == "muon" and n.endswith("_proj.weight")}


def test_muon_learns_and_resumes_exactly(demo_folder, tmp_path):
    train.main(arguments(demo_folder, tmp_path / "whole", optimizer="muon"))
    steps = [x for x in read_log(tmp_path / "whole") if "tokens" in x]
    assert steps[3]["text_nll"] < steps[0]["text_nll"] and steps[-1]["speech_nll"] < steps[4]["speech_nll"]
    name = "checkpoint-00000015"  # in the middle of stage 2
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "part" / name)
    train.main(arguments(demo_folder, tmp_path / "part", optimizer="muon", resume=True))
    ends = [weights(tmp_path / part / "checkpoint-00000017") for part in ("whole", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_dtype_auto_chooses_the_faster(demo_folder, tmp_path, monkeypatch, capsys):
    """And a resumed run keeps its choice, even if the other one is faster now."""
    clock, slow = [0.0], [torch.float32]

    def add_gradients(model, batches, beta, autocast, world):
        clock[0] += 2 if autocast.dtype == slow[0] else 1

    settings, name = configure(train.DEFAULTS, arguments(demo_folder, tmp_path, dtype="auto"), train.complete_stages)
    c = train.check_settings(settings, name, ALONE)
    data = train.open_data(c, ALONE)
    model = train.build_model(c, data.tokenizer)
    monkeypatch.setattr(train, "make_autocast", lambda dtype, device: SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(train, "add_gradients", add_gradients)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    for slow[0], wanted in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        assert train.choose_dtype(c, model, data, ALONE) == wanted
    assert "1.00 s a micro-batch in float32, 2.00 s in bfloat16" in capsys.readouterr().out
    assert train.choose_dtype(c, model, data, ALONE, "bfloat16") == torch.bfloat16
    c.dtype = "bfloat16"
    assert train.choose_dtype(c, model, data, ALONE) == torch.bfloat16


@pytest.mark.parametrize("more, message", [
    (dict(batch_tokens=64 * 12 + 1), "batch_tokens=769 is not a whole number of sequences of 64"),
    (dict(stages=dict(s=dict(steps=1, mixture=dict(text=1), warmpu=1))), "stages.s.warmpu.*did you mean warmup"),
    (dict(stages=dict(s=dict(steps=1, mixture=dict(video=1)))), "stages.s.mixture: video=1"),
    (dict(stages=dict(s=dict(steps=0, mixture=dict(text=1)))), "stages.s: give steps of 1 or more"),
    (dict(beta="1e999"), "beta=inf: give 0 or more, and less than inf"),
    (dict(layer_pooling="mean"), "layer_pooling='mean'"),
    (dict(resume=True), "no checkpoint to go on from"),
    (dict(tokenizer=""), "name a config, for example: python train.py config/train_tiny.py"),
    (dict(text=[]), "^text: no data set named"),
    (dict(cloze="nowhere"), "nowhere: no data set here"),
    (dict(units="", n_units=29), ": 30 units, the model has 29; set --units"),
    (dict(vocab_size=100), "vocab_size=100 cannot hold")])
def test_bad_settings_end_in_one_line(demo_folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stop:
        train.main(arguments(demo_folder, tmp_path / "out", **more))
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_a_cloze_set_that_cannot_be_scored_is_refused_first(demo_folder):
    good = open_set(demo_folder / "cloze")
    train.check_cloze(good, 2048)
    with pytest.raises(SystemExit, match="empty, or longer with its ending than the 9 positions"):
        train.check_cloze(good, 9)
    with pytest.raises(SystemExit, match="paired set with its documents in threes"):
        train.check_cloze(open_set(demo_folder / "text"), 2048)


def micro_batches(*sizes):
    """Micro-batches of so many rows of 22 text ids, 5 units and the end of speech; the same rows whatever the sizes."""
    rows = torch.arange(1, 29).view(4, 7).repeat(3, 1)[:sum(sizes)]
    batches = []
    for part in rows.split(sizes):
        ids, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        batches.append(Batch(ids, targets, make_layout(ids, targets, TINY), np.arange(len(part))))
    return batches


def test_micro_batches_of_any_size_give_the_same_gradients():
    """And the same losses: they are those of one batch, whose loss is one mean over all targets."""
    torch.manual_seed(0)
    model, [batch], results = SmolTolk(TINY), micro_batches(12), []
    torch.nn.init.normal_(model.layer_selector.weight)  # at its start the entropy has no gradient
    for sizes in ((12,), (7, 4, 1)):
        model.zero_grad()
        sums, _ = train.add_gradients(model, micro_batches(*sizes), 0.1, nullcontext(), ALONE)
        results.append([sums, *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    out = model(batch.ids, batch.targets, batch.layout)
    entropy = selector_entropy(out.log_omega)
    (torch.cat([out.text_nll, out.speech_nll]).mean() - 0.1 * entropy / batch.ids.numel()).backward()
    sums = torch.stack([out.text_nll.sum(), out.speech_nll.sum(), entropy]).detach()
    for result in results:
        torch.testing.assert_close(result, [sums, *(p.grad for p in model.parameters())])


@pytest.mark.parametrize("config", sorted(ROOT.rglob("config/*_*.py")), ids=lambda p: p.stem)
def test_every_config_is_sound(config):
    settings, name = configure(train.DEFAULTS, [str(config)], train.complete_stages)
    c = train.check_settings(settings, name, World(size=4))
    assert c.out_dir == f"out/{config.stem}"
    parts = [c.input_adapter_layers, c.output_adapter_layers, c.layer_pooling, c.residual]
    assert parts == ([0, 0, "last", False] if "baseline" in name else [2, 2, "dynamic", True])
    if name.endswith(("m", "b")):  # the sizes of Section 4.1
        stages, tokens = c.stages, c.batch_tokens * sum(s["steps"] for s in c.stages.values())
        assert c.batch_tokens == 2**20 and c.rope_theta == 100_000 and c.sequence_length == 2048
        assert tokens == pytest.approx(32e9 if name == "train_2b" else 16e9, rel=1e-3)
        assert list(stages) == (["stage2"] if "baseline" in name else ["stage1", "stage2"])
        assert stages["stage2"]["learning_rate"] == (1e-4 if name == "train_2b" else 3e-4)
        if "stage1" in stages:
            assert stages["stage1"]["speech_learning_rate"] == pytest.approx(10 * stages["stage2"]["learning_rate"])
        assert c.beta == (0.01 if name in ("train_400m", "train_2b") else 0)


def test_evaluate_gives_the_table_of_the_run(run, demo_folder, tmp_path):
    sets = [f"--val_{kind}={[str(demo_folder / 'val')]}" for kind in ("text", "speech", "interleaved")]
    evaluate.main([f"--checkpoint={run}", f"--cloze={demo_folder / 'cloze'}", "--sequence_length=64", "--seed=1",
                   "--val_sequences=24", f"--out={tmp_path / 'e.json'}", "--device=cpu", *sets])
    ours, theirs = json.loads((tmp_path / "e.json").read_text()), json.loads((run / "results.json").read_text())
    assert flat(ours["nll"]) == pytest.approx(flat(theirs["nll"]), rel=1e-4)
    assert flat(ours["topic_cloze"]) == pytest.approx(flat(theirs["topic_cloze"]))
