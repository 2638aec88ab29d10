# Table 2, "-In Adapter".
base = "train_400m.py"
input_adapter_layers = 0
