# Table 2, "-Residual".
base = "train_400m.py"
residual = False
