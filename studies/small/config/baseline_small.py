# The vocabulary-expansion baseline of the small study: the data and tokens of train_small.py, without stage 1.
base = "train_small.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
stages = dict(
    stage2=dict(steps=763, mixture=dict(text=1, speech=2, interleaved=2), train="all", learning_rate=3e-4, warmup=20,
                decay=0.3),
)
