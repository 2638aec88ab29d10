# SmolTolk-150M, on SmolLM-135M. 16 billion tokens: 1,000 + 14,259 steps of 1,048,576.
#   torchrun --nproc_per_node=4 train.py config/train_150m.py
init_from = "weights/smollm-135m"
tokenizer = "weights/smollm-135m/tokenizer.json"
rope_theta = 100_000.0  # as in the paper; SmolLM has 10,000
units = "units/mhubert"  # 500 units at 25 Hz; tools/convert.py makes this folder

# Table 6. Text has the weights of SmolLM's own training. Speech is drawn by size. In interleaved data the Spoken
# Wikipedia (swc) is drawn more often than its size says.
text = {"data/fineweb-edu": 0.7, "data/cosmopedia-v2": 0.15, "data/python-edu": 0.08, "data/finemath": 0.06}
speech = ["data/librispeech", "data/librilight", "data/swc-speech", "data/tedlium", "data/peoples-speech",
          "data/voxpopuli", "data/stinystories"]
interleaved = {"data/libriheavy": 0.37, "data/stinystories": 0.53, "data/swc": 0.1}
val_text = ["data/fineweb-edu-val"]
val_speech = ["data/librispeech-dev"]
val_interleaved = ["data/stinystories-val"]

stages = dict(
    stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", speech_learning_rate=10 * 3e-4,
                warmup=100, decay=0.2),
    stage2=dict(steps=14_259, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4),
)
micro_batch = 32  # 44 GB on a GPU; with 16 it is 24 GB, and 6 to 10% slower
compile = True
