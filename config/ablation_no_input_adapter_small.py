# Table 2, "-In Adapter".
base = "train_small.py"
input_adapter_layers = 0
