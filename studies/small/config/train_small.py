# The small study: SmolTolk on SmolLM2-135M. studies/small/README.md says how the data is made.
# 763 steps of 131,072 tokens are 100 million tokens, for one H100.
init_from = "weights/smollm2-135m"
tokenizer = "weights/smollm2-135m/tokenizer.json"
units = "data/small/units"
text = ["data/small/train"]
speech = ["data/small/train"]
interleaved = ["data/small/train"]
val_text = ["data/small/val"]
val_speech = ["data/small/val"]
val_interleaved = ["data/small/val"]
cloze = "data/small/cloze"
sequence_length = 1024
batch_tokens = 128 * 1024
micro_batch = 32
beta = 0.01  # The paper has 0 at this size. Without it a layer selector may collapse onto one layer.

# One part in five is text, not one in three as in the paper, because there are only 2 million text tokens. Text
# sequences read them eight times over, and interleaved sequences as often again.
stages = dict(
    stage1=dict(steps=150, mixture=dict(interleaved=1), train="new", speech_learning_rate=10 * 3e-4, warmup=20,
                decay=0.2),
    stage2=dict(steps=613, mixture=dict(text=1, speech=2, interleaved=2), train="all", learning_rate=3e-4, warmup=20,
                decay=0.3),
)
compile = True
eval_interval = 200
checkpoint_interval = 200
keep_checkpoints = 1
