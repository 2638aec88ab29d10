# SmolLM2-135M learns to hear and speak on a CPU: few steps, on a book read aloud (see corpora/prose.py).
init_from = "weights/smollm2-135m"
tokenizer = "weights/smollm2-135m/tokenizer.json"
units = "data/demo/units"
text = ["data/prose"]
speech = ["data/prose"]
interleaved = ["data/prose"]
val_text = ["data/prose_held_out"]
val_speech = ["data/prose_held_out"]
val_interleaved = ["data/prose_held_out"]
sequence_length = 512
batch_tokens = 4 * 512
micro_batch = 4
beta = 0.01
stages = dict(
    stage1=dict(steps=100, mixture=dict(interleaved=1), train="new", speech_learning_rate=6e-4, warmup=15, decay=0.2),
    stage2=dict(steps=20, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=1e-4,
                speech_learning_rate=2e-4, warmup=5, decay=0.3),
)
log_interval = 5
eval_interval = 60
eval_sequences = 8
checkpoint_interval = 40
