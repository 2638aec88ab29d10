# SmolTolk-2B, on SmolLM-1.7B. 32 billion tokens: 1,000 + 29,518 steps.
base = "train_150m.py"
init_from = "weights/smollm-1.7b"
tokenizer = "weights/smollm-1.7b/tokenizer.json"
beta = 0.01
stages = dict(
    stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", speech_learning_rate=10 * 1e-4,
                warmup=100, decay=0.2),
    stage2=dict(steps=29_518, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=1e-4),
)
micro_batch = 4  # 58 GB on a GPU by count; with 8 it is 78, or 70 with recompute = True: too close to 80
