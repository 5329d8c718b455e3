#!/usr/bin/env bash
# The 340M run on one GPU and on two (FSDP2), the same global batch, and plain next-token training on one beside it:
#   bash benchmarks/llama_340M.sh OUT [STEPS]
# Prints a table and draws OUT/curves.png. Needs no network: the Python standard library as bytes.
set -euo pipefail
out=${1:?usage: bash benchmarks/llama_340M.sh OUT [STEPS]}
steps=${2:-240}
cd "$(dirname "$0")/.."

run() { # name, processes, micro-steps, further options
    local name=$1 ngpu=$2 accumulation=$3
    shift 3
    NGPU=$ngpu bash train.sh --job.config_file configs/llama_340M.toml --job.dump_folder "$out/$name" \
        --training.dataset stdlib --training.dataset_name "" --model.tokenizer_path bytes \
        --training.steps "$steps" --training.gradient_accumulation_steps "$accumulation" \
        --lr_scheduler.warmup_steps 40 --objective.warmup_steps 40 --future_encoder.loss_weight 0.1 \
        --future_encoder.layers 0 --future_encoder.max_anchors 0 --metrics.log_freq 4 \
        --checkpoint.interval 1000000 --checkpoint.export_hf false "$@"
}

runs=("$out/one_gpu")
run one_gpu 1 2
if [ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ]; then
    run two_gpus 2 1
    runs+=("$out/two_gpus")
fi
run next_token 1 2 --objective.name next_token
python3 -m benchmarks.summarize "${runs[@]}" "$out/next_token"
python3 -m flame.cli.plot "${runs[@]}" "$out/next_token" --out "$out/curves.png"
