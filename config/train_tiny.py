# The tiny run. It makes spoken stories, trains a backbone on their text, and then trains SmolTolk on top of it.
demo = "data/demo"

hidden_size = 96
intermediate_size = 256
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 1
sequence_length = 256
batch_tokens = 8 * 256
beta = 0.1
dtype = "float32"  # on all machines, so that a table means the same everywhere

# Stage `text` trains the text LM that SmolTolk starts from. It stands in for the pre-training of SmolLM.
stages = dict(
    text=dict(steps=90, mixture=dict(text=1), train="text", learning_rate=3e-3, warmup=20, decay=0.2),
    stage1=dict(steps=580, mixture=dict(interleaved=1), train="new", speech_learning_rate=8e-3, warmup=50, decay=0.2),
    stage2=dict(steps=360, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=2e-3, decay=0.7),
)
log_interval = 20
eval_interval = 250
eval_sequences = 32
eval_cloze_items = 50
checkpoint_interval = 250
