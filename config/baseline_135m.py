# Baseline-135M: SmolLM-135M with the speech units added to its vocabulary and no other change. It skips stage 1.
# 16 billion tokens.
base = "train_150m.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
stages = dict(
    stage2=dict(steps=15_259, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4),
)
