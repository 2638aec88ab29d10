# The vocabulary-expansion baseline beside train_tiny.py: same data, same steps, none of SmolTolk's modules.
base = "train_tiny.py"
input_adapter_layers = 0
output_adapter_layers = 0
layer_pooling = "last"
residual = False
beta = 0.0
