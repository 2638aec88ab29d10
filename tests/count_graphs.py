"""Run under torchrun by test_cuda.py: train a small compiled model as train.py does, and count graphs.

Prints {stage: [numbers of graphs made in each of its steps]} in JSON. The number of rows differs between micro-batches.
"""
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from configurator import configure
from data import loader, open_source
from runtime import distributed
from runtime.devices import make_autocast
from tools.bench import write_random_set

STEPS = 20
COMMAND = ["--hidden_size=192", "--intermediate_size=768", "--num_hidden_layers=2", "--num_attention_heads=2",
           "--num_key_value_heads=1", "--vocab_size=400", "--n_units=20", "--sequence_length=64", "--micro_batch=5",
           "--batch_tokens=1792", "--beta=0.1", "--input_adapter_layers=1", "--output_adapter_layers=1",
           "--compile=true", "--device=cpu"]  # 28 sequences of 64 tokens a step


def main():
    graphs, compile_of_torch = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph  # runs as it is, without compiling it

    torch.compile = partial(compile_of_torch, backend=backend)
    # A bucket must hold fewer weights than the model, or there would be nothing to cut.
    distributed.DistributedDataParallel = partial(distributed.DistributedDataParallel, bucket_cap_mb=1)
    settings, name = configure(train.DEFAULTS, COMMAND, train.complete_stages)
    world = distributed.join_world("cpu")
    c = train.check_settings(settings, name, world)
    model = train.place_model(train.build_model(c, SimpleNamespace(eos=0)), c, world)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_set(Path(folder) / "set", c.vocab_size, c.n_units, n_documents=20)
        sources = dict.fromkeys(("text", "speech", "interleaved"), open_source("interleaved", [Path(folder) / "set"]))
        for number, (name, stage) in enumerate(c.stages.items()):
            train.set_trainable(model, stage["train"])
            net, counts[name] = distributed.distribute(model, world), []
            for _, batches in loader(sources, stage | dict(steps=STEPS), number, 0, c, model.config, world):
                before = len(graphs)
                train.add_gradients(net, batches, c.beta, make_autocast(torch.bfloat16, world.device), world)
                counts[name].append(len(graphs) - before)
    print(json.dumps(counts))
    distributed.leave_world()


if __name__ == "__main__":
    main()
