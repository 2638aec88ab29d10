# Baseline-360M: SmolLM-360M with the speech units in its vocabulary, nothing else. Stage 2 alone, 16B tokens.
base = "baseline_135m.py"
init_from = "weights/smollm-360m"
tokenizer = "weights/smollm-360m/tokenizer.json"
micro_batch = 8
