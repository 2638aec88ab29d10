# Table 2, "-Layer pooling".
base = "train_tiny.py"
layer_pooling = "last"  # the last layer only
beta = 0.0
