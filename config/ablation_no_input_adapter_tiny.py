# Table 2, "-In Adapter".
base = "train_tiny.py"
input_adapter_layers = 0
