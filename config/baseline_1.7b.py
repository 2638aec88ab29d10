# Baseline-1.7B: vocabulary expansion of SmolLM-1.7B, 16 billion tokens.
# The paper also trains it on 32 billion tokens, to compare it with SmolTolk-2B: --stages.stage2.steps=30_518
base = "baseline_135m.py"
init_from = "weights/smollm-1.7b"
tokenizer = "weights/smollm-1.7b/tokenizer.json"
micro_batch = 4
