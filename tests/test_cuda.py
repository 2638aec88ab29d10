"""What only a GPU does, compared with the CPU. `pytest -m cuda` selects the tests that need a GPU."""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import ABLATIONS, TINY, interleaved, loss_of, make
from test_sample import collect
from test_train import arguments
from torch.overrides import TorchFunctionMode

import model as smoltolk
from evaluate import log_likelihood
from model import SmolTolk, make_layout
from runtime.log import utilisation

ROOT = Path(__file__).resolve().parent.parent
HALF = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)  # head_dim 16: FlashAttention works


def on_gpu(test):
    """Mark a test that needs a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


# ---------------------------------------------------------------------------------------------------------------------
# on any machine

class SayCuda(TorchFunctionMode):
    """Tensors on the CPU answer is_cuda with True, so that the model takes the branches for a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cuda.__get__:
            return True
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_branches_for_a_gpu_give_the_same(half, monkeypatch):
    """Runs by a varlen kernel in bfloat16, masks in float32, as many key heads as query heads where a kernel asks."""
    used = []

    def varlen(q, k, v, bounds, *rest, **options):
        used.append(q.dtype)
        return fake_varlen(q, k, v, bounds)

    monkeypatch.setattr(smoltolk, "flash_attn_varlen_func", None)
    monkeypatch.setattr(smoltolk, "varlen_attn", varlen)
    m, ids = make(**HALF), interleaved(4, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        plain = m(ids)
        for layout in (make_layout(ids, ids, m.config), None):
            with SayCuda():
                out = m(ids, layout=layout)
            assert_near((out.text, out.speech), (plain.text, plain.speech), 3e-2 if half else 1e-5)
    assert used == [torch.bfloat16] * m.config.input_adapter_layers * half  # the second time there were no runs


def fake_varlen(q, k, v, bounds):
    """Causal attention within each run, slowly. It checks what FlashAttention asks of its arguments."""
    n = q.size(0)
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and int(bounds[0]) == 0 and int(bounds[-1]) == n
    assert (bounds.diff() >= 0).all() and q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.size(-1) % 8 == 0 and q.size(-1) <= 256 and q.size(1) % k.size(1) == 0
    y, group = torch.empty_like(q), q.size(1) // k.size(1)
    for start, end in itertools.pairwise(bounds.tolist()):
        if start < end:  # empty runs are allowed; make_layout appends them
            qs, ks, vs = (t[start:end].transpose(0, 1).float() for t in (q, k, v))
            ks, vs = ks.repeat_interleave(group, 0), vs.repeat_interleave(group, 0)
            scores = qs @ ks.transpose(1, 2) / q.size(-1) ** 0.5
            allowed = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            y[start:end] = (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ vs).transpose(0, 1).to(y.dtype)
    return y


@pytest.mark.parametrize("longest", [1, 2, 8, 200])
def test_bounds_of_runs(longest):
    """From one symbol a run to a row that is one run: int32, rising, from 0 to the end, no run longer than a row."""
    ids = interleaved(6, 128, longest=longest)
    bounds = make_layout(ids, ids, TINY).runs
    sizes = bounds.diff()
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == ids.numel()
    assert sizes.min() >= 0 and sizes.max() <= ids.size(1) and len(sizes) in (24, 96, 768)
    is_speech = smoltolk.find_speech(ids, TINY)
    begins = torch.cat([torch.ones(6, 1, dtype=torch.bool), is_speech[:, 1:] != is_speech[:, :-1]], 1).flatten()
    assert torch.equal(bounds[:-1][sizes > 0].long(), begins.nonzero()[:, 0])


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce GTX 1080", None)])
def test_peak_rates(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utilisation(1e12, torch.device("cuda")) == (1e12 / peak if peak else None)


def test_graphs_of_torch_compile():
    """As torchrun runs it, over twenty steps whose micro-batches differ in their numbers of rows and of targets."""
    launched = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1",
                               str(ROOT / "tests/count_graphs.py")], capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr
    counts = json.loads(launched.stdout.splitlines()[-1])
    # Stage 1: a layer with masks, a frozen one and a trained one, and layer pooling, each for one number of rows and
    # for any; the losses of both heads. Stage 2: pooling of text batches, the loss of the text head, which is trained
    # now, and the loss of a batch without text targets.
    assert sum(counts["stage1"]) == 10 and sum(counts["stage2"]) == 3
    assert not any(counts["stage1"][1:]) and not any(counts["stage2"][10:])


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU

def loss_and_gradients(m, ids):
    m.zero_grad()
    loss = loss_of(m, ids)
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in m.parameters())]


def assert_near(ours, theirs, limit):
    """The relative distance of two lists of tensors, each taken as one vector."""
    ours, theirs = (torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in (ours, theirs))
    assert (ours - theirs).norm() / theirs.norm() < limit


def mild(**overrides):
    """A model with weights of the usual size. Those of make() are so large that bfloat16 changes gradients by half."""
    torch.manual_seed(0)
    return SmolTolk(dataclasses.replace(TINY, **HALF | overrides, initializer_range=0.1)).start_new_modules("release")


@on_gpu
@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
def test_gpu_and_cpu_agree(overrides):
    """Losses and gradients, in float32 and in bfloat16."""
    ids = interleaved(5, 41)
    theirs = loss_and_gradients(mild(**overrides), ids)
    m = mild(**overrides).cuda()
    assert_near(loss_and_gradients(m, ids.cuda()), theirs, 1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert m.can_use_flash(ids.cuda())
        assert_near(loss_and_gradients(m, ids.cuda()), theirs, 0.02)


@on_gpu
def test_kernels_for_runs_agree_with_masks(monkeypatch):
    """The varlen kernel, with empty runs, against a mask, both in bfloat16."""
    m, ids = mild().cuda(), interleaved(8, 64).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        flash = loss_and_gradients(m, ids)
        monkeypatch.setattr(SmolTolk, "can_use_flash", lambda self, ids: False)
        assert_near(flash, loss_and_gradients(m, ids), 0.01)


@on_gpu
@pytest.mark.parametrize("half", [False, True])
def test_compiled_on_gpu(half):
    """Real kernels of torch.compile: the same losses and gradients for micro-batches of several sizes."""
    torch._dynamo.reset()
    eager, compiled = mild().train().cuda(), mild().train().cuda()
    compiled.compile_training()
    for seed, rows in enumerate((6, 5, 4, 6, 3)):
        ids = interleaved(rows, 65, seed=seed).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            assert_near(loss_and_gradients(compiled, ids), loss_and_gradients(eager, ids), 0.02 if half else 1e-4)


@on_gpu
def test_generation_on_gpu():
    """With a CUDA graph, without one, and on the CPU: the same symbols."""
    plan, openings = [("text", 9), ("speech", 8), ("text", 7)], [[1, 2, 3], [60, 52, 53, 61]]
    made = []
    for device, compiled in (("cpu", False), ("cuda", False), ("cuda", True)):
        m = make(**HALF).to(device)
        made.append(collect(m, openings, plan, lambda logits: logits[:, 1:-1].argmax(-1) + 1, compiled=compiled))
    assert made[0] == made[1] == made[2]


@on_gpu
def test_scores_on_gpu():
    rows = interleaved(12, 30).tolist()
    sequences, spans = [row[:10 + i] for i, row in enumerate(rows)], [(3, 10 + i) for i in range(12)]
    on_cpu, counts = log_likelihood(make(**HALF), sequences, spans, 128)
    on_gpu, again = log_likelihood(make(**HALF).cuda(), sequences, spans, 128)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4) and (counts == again).all()


@on_gpu
def test_training_on_gpu(demo_folder, tmp_path):
    """Under torchrun with NCCL and torch.compile, in bfloat16: losses like a CPU's, and a run that can be resumed."""
    logs = {}
    for device, more in dict(cpu={}, cuda=dict(compile=True, dtype="bfloat16")).items():
        out = tmp_path / device
        command = arguments(demo_folder, out, hidden_size=64, device=device, **more)
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=1"] if device == "cuda" else []
        environment = os.environ | dict(OMP_NUM_THREADS="4")
        subprocess.run([sys.executable, *launcher, "train.py", *command], cwd=ROOT, check=True, env=environment)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs[device] = [line for line in lines if "tokens" in line]
        if device == "cuda":  # go back to a checkpoint within stage 2
            for path in out.glob("checkpoint-*17"):
                path.rename(tmp_path / path.name)
            (out / "results.json").unlink()
            subprocess.run([sys.executable, *launcher, "train.py", *command, "--resume=true"], cwd=ROOT, check=True,
                           env=environment)
            again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            assert [x["step"] for x in again if "tokens" in x] == list(range(1, 18))
            assert [x["speech_nll"] for x in again if "tokens" in x][14:] == pytest.approx(
                [x["speech_nll"] for x in logs["cuda"]][14:], rel=1e-2)
    for key in ("text_nll", "speech_nll"):
        ours, theirs = ([line[key] for line in logs[device] if line[key] is not None] for device in ("cuda", "cpu"))
        assert ours == pytest.approx(theirs, rel=0.02), key
