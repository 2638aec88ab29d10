#!/usr/bin/env bash
# One day with a GPU, in five stages. Run from the top of the repository.
#
#   tools/gpu_day.sh 1         the tests that need a GPU
#   tools/gpu_day.sh 2         speed and memory of the three sizes, pairs of settings, generation, scoring, batches
#   tools/gpu_day.sh 3         the small study's two main runs (studies/small/README.md: its data comes first)
#   tools/gpu_day.sh 4         its ablations, and the baseline with as much compute
#   tools/gpu_day.sh 5         further seeds, and the runs of 300 million tokens
#   tools/gpu_day.sh pack      all results without weights, as pieces of at most 60 MB, in out/gpu_day/pieces
#
# What has finished is skipped, and a study continues where it was cut off, so every command can be repeated. MINUTES
# bounds a call, for machines that are lent for a short time: MINUTES=8 tools/gpu_day.sh 3. With MINIATURE=1 all stages
# run on a CPU, with small models and the tiny study. Results: out/gpu_day, out/study_small.
set -euo pipefail
out=out/gpu_day${MINIATURE:+_miniature}
minutes=${MINUTES:-600}
if ! [[ $minutes =~ ^[0-9]+$ ]]; then
    echo "MINUTES=$minutes: give whole minutes"
    exit 1
fi
deadline=$((SECONDS + minutes * 60))
failed=0
mkdir -p "$out"

bench="python -m tools.bench"
study="python -m studies.small"
results="$out out/study_small studies/results"
ablations='["no_input_adapter","no_output_adapter","no_adapters","no_layer_pooling","no_dynamic_pooling","no_residual"]'
options=(--seeds=[1,2,3])
if [ "${MINIATURE:-}" ]; then
    bench="$bench --device=cpu --init_from= --hidden_size=64 --intermediate_size=96 --num_hidden_layers=2
           --num_attention_heads=2 --num_key_value_heads=1 --vocab_size=4000 --sequence_length=64 --micro_batch=2
           --compile=false --steps=1 --dtype=float32"
    study="python -m studies.tiny"
    results=$out
    options+=("--out=$out/study" "--options=--stages.text.steps=6 --stages.stage2.steps=6 --batch_tokens=1024
              --eval_sequences=4 --eval_cloze_items=6 --checkpoint_interval=3")
fi

# in_time COMMAND...: run a command until the deadline
in_time() {
    local left=$((deadline - SECONDS)) status=0
    if [ "$left" -gt 0 ]; then
        timeout --foreground "$left" "$@" || status=$?
    fi
    if [ "$left" -le 0 ] || [ "$status" = 124 ]; then
        echo "time is over; repeat the command to go on"
        exit 124
    fi
    return "$status"
}

# once NAME COMMAND...: run a command and keep what it prints, unless it has finished before
once() {
    local name=$1 status=0
    shift
    if [ -e "$out/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name: $*"
    in_time "$@" 2>&1 | tee "$out/$name.log" || status=$?
    [ "$status" != 124 ] || exit 124
    if [ "$status" = 0 ]; then
        touch "$out/$name.done"
    else
        echo "$name: failed, see $out/$name.log"
        failed=1
    fi
}

# For each size the training step, and for 150M what a change of one setting does.
speed() {
    for size in 150m 400m 2b; do
        once "bench_$size" $bench "config/train_$size.py" --what=train --micro_batches=3 "--out=$out/bench_$size.json"
    done
    for pair in compile=false micro_batch=32 recompute=true dtype=float32; do
        once "pair_$pair" $bench config/train_150m.py --what=train --micro_batches=3 "--pair=$pair" \
            "--out=$out/pair_$pair.json"
    done
    once bench_use $bench config/train_150m.py --what=score,generate,data "--out=$out/bench_use.json"
    once bench_llama $bench config/train_150m.py --what=train --micro_batches=3 --reference=true "--out=$out/llama.json"
}

# run_study SEEDS RUNS: make the runs that are missing, then the tables and pictures of all finished runs
run_study() {
    in_time $study run "${options[@]}" "--seeds=$1" "--runs=$2"
    in_time $study tables "${options[@]}"
    in_time $study pictures "${options[@]}"
}

case "${1:-}" in
1)
    if [ -z "${MINIATURE:-}" ] && ! python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
        echo "torch sees no GPU; with MINIATURE=1 the stages run on a CPU"
        exit 1
    fi
    once tests python -m pytest -q tests/test_cuda.py
    ;;
2) speed ;;
3) run_study [1] '["smoltolk","baseline"]' ;;
4)
    run_study [1] "$ablations"
    run_study [1] '["equal_flops"]'
    ;;
5)
    run_study [1,2,3] '["smoltolk","baseline"]'
    [ "${MINIATURE:-}" ] || run_study [1] '["smoltolk_300m","baseline_300m"]'
    ;;
pack)
    mkdir -p "$out/pieces" out/study_small studies/results
    rm -f "$out"/pieces/*
    find $results -path "$out/pieces" -prune -o -type f ! -name '*.safetensors' -print |
        tar czf - -T - | split -b 60M - "$out/pieces/results.tar.gz."
    ls -l "$out/pieces"
    echo "put them together with: cat results.tar.gz.* | tar xzf -"
    ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
esac
exit $failed
