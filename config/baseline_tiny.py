# The vocabulary-expansion baseline beside train_tiny.py: same data, same number of steps, none of SmolTolk's modules.
base = "train_tiny.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
# As in the paper it skips stage 1, where it could train nothing but its new embeddings; it has those steps in stage 2
stages = dict(
    text=dict(steps=120, mixture=dict(text=1), train="text", learning_rate=3e-3, warmup=20, decay=0.2),
    stage2=dict(steps=700, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=1.5e-3, decay=0.3),
)
