# SmolTolk-400M: SmolLM-360M, 16 billion tokens.
base = "train_150m.py"
init_from = "weights/smollm-360m"
tokenizer = "weights/smollm-360m/tokenizer.json"
beta = 0.01  # larger models' layer selectors may collapse without it
micro_batch = 8
