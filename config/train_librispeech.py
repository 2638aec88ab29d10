# A first real run on one GPU: SmolLM-135M learns to hear and speak from 460 hours of LibriSpeech (runs/librispeech.sh).
# 1,000 + 4,000 steps of 131,072 tokens: 655 million tokens.
base = "train_150m.py"
text = ["data/fineweb-100m"]
speech = ["data/librispeech-words"]  # a paired set also gives speech alone
interleaved = ["data/librispeech-words"]
val_text = ["data/fineweb-100m-val"]
val_speech = ["data/librispeech-words-dev"]
val_interleaved = ["data/librispeech-words-dev"]
batch_tokens = 2**17
stages = dict(
    stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", speech_learning_rate=10 * 3e-4,
                warmup=100, decay=0.2),
    stage2=dict(steps=4000, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4, decay=0.2),
)
micro_batch = 16
