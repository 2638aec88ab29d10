# Vocabulary expansion, the baseline of train_tiny.py: the same data, but none of SmolTolk's modules.
# As we read the paper, it skips stage 1, where it could train nothing but its new embeddings.
# For as many steps in all as SmolTolk: --stages.stage2.steps=940
base = "train_tiny.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
stages = dict(
    text=dict(steps=90, mixture=dict(text=1), train="text", learning_rate=3e-3, warmup=20, decay=0.2),
    stage2=dict(steps=360, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=2e-3, decay=0.7),
)
