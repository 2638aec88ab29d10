# Baseline-360M: SmolLM-360M with the speech units in its vocabulary, nothing else. Stage 2 alone, 16B tokens.
base = "train_400m.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
stages = dict(
    stage2=dict(steps=15_259, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4),
)
