#!/usr/bin/env bash
# One day with a GPU, in five stages. Run from the top of the repository.
#
#   tools/gpu_day.sh 1         the tests that need a GPU
#   tools/gpu_day.sh 2         speed and memory of the three sizes, pairs of settings, generation, scoring, batches
#   tools/gpu_day.sh 3         the small study's two main runs (studies/small/README.md: its data comes first)
#   tools/gpu_day.sh 4         its ablations
#   tools/gpu_day.sh 5         further seeds, and the runs of 300 million tokens
#   tools/gpu_day.sh pack      results as archives of at most 60 MB, without weights, in out/gpu_day/pieces
#
# A stage that has finished is skipped, and a study continues where it was cut off, so every command can be repeated.
# MINUTES bounds a call, for machines that are lent for a short time: MINUTES=8 tools/gpu_day.sh 3. With MINIATURE=1 all
# stages run on a CPU, with small models and the tiny study. Results: out/gpu_day, out/study_small.
set -euo pipefail
out=${OUT_DIR:-out/gpu_day}
minutes=${MINUTES:-600}
mkdir -p "$out"

bench="python -m tools.bench"
study="python -m studies.small"
ablations='["no_input_adapter","no_output_adapter","no_adapters","no_layer_pooling","no_dynamic_pooling","no_residual"]'
options=()
if [ "${MINIATURE:-}" ]; then
    bench="$bench --device=cpu --init_from= --hidden_size=64 --intermediate_size=96 --num_hidden_layers=2
           --num_attention_heads=2 --num_key_value_heads=1 --vocab_size=4000 --sequence_length=64 --micro_batch=2
           --compile=false --steps=1 --dtype=float32"
    study="python -m studies.tiny"
    options=("--out=$out/study" "--options=--stages.text.steps=6 --stages.stage2.steps=6 --batch_tokens=1024
             --eval_sequences=4 --eval_cloze_items=6 --checkpoint_interval=3")
fi

# once NAME COMMAND...: run a command and keep what it prints, unless it has already finished
once() {
    local name=$1
    shift
    if [ -e "$out/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name: $*"
    timeout "$((minutes * 60))" "$@" 2>&1 | tee "$out/$name.log"
    touch "$out/$name.done"
}

# For each size the training step, and for 150M what a change of one setting does.
speed() {
    for size in 150m 400m 2b; do
        once "bench_$size" $bench "config/train_$size.py" --what=train --micro_batches=3 "--out=$out/bench_$size.json"
    done
    once bench_llama $bench config/train_150m.py --what=train --micro_batches=3 --reference=true "--out=$out/llama.json"
    for pair in compile=false micro_batch=32 recompute=true dtype=float32; do
        once "pair_$pair" $bench config/train_150m.py --what=train --micro_batches=3 "--pair=$pair" \
            "--out=$out/pair_$pair.json"
    done
    once bench_use $bench config/train_150m.py --what=score,generate,data "--out=$out/bench_use.json"
}

# run_study SEEDS RUNS: make the runs that are missing, then the tables and pictures of all finished runs
run_study() {
    local status=0
    timeout "$((minutes * 60))" $study run "--seeds=$1" "--runs=$2" "${options[@]}" || status=$?
    if [ "$status" = 124 ]; then
        echo "time is over; repeat the command to go on"
        exit 124
    fi
    [ "$status" = 0 ] || exit "$status"
    $study tables "--seeds=$1" "${options[@]}"
    $study pictures "${options[@]}"
}

case "${1:-}" in
1) once tests python -m pytest -q tests/test_cuda.py ;;
2) speed ;;
3) run_study '[1]' '["smoltolk","baseline"]' ;;
4) run_study '[1]' "$ablations" ;;
5) run_study '[1,2,3]' '["smoltolk","baseline"]'
   [ "${MINIATURE:-}" ] || run_study '[1]' '["smoltolk_300m","baseline_300m"]' ;;
pack)
    mkdir -p "$out/pieces"
    rm -f "$out"/pieces/*
    find "$out" out/study_small -path "$out/pieces" -prune -o -type f ! -name '*.safetensors' -print 2>/dev/null |
        tar czf - -T - | split -b 60M - "$out/pieces/results.tar.gz."
    ls -l "$out/pieces"
    echo "put them together with: cat results.tar.gz.* | tar xzf -" ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
esac
