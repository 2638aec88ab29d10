# Table 2, "-Layer pooling".
base = "train_small.py"
layer_pooling = "last"  # the last layer only
beta = 0.0
