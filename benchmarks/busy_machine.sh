#!/usr/bin/env bash
# CPU training beside another program, with libgomp's own spin count (300,000, its manual says) and with the one train.sh sets:
#   bash benchmarks/busy_machine.sh OUT
# Prints the median tokens/s of the last six of eight quick-start steps. About six minutes on two cores.
set -euo pipefail
out=${1:?usage: bash benchmarks/busy_machine.sh OUT}
cd "$(dirname "$0")/.."

measure() { # machine, spin count
    local run=$out/$1_$2
    GOMP_SPINCOUNT=$2 bash train.sh --job.config_file configs/quickstart.toml --job.dump_folder "$run" \
        --training.steps 8 --lr_scheduler.warmup_steps 8 --checkpoint.enable_checkpoint false > /dev/null
    python3 - "$run/metrics.jsonl" "$1" "$2" <<'PY'
import json, statistics, sys
rates = [json.loads(line)["tokens_per_second"] for line in open(sys.argv[1])][2:]
print(f"{sys.argv[2]:5} machine, spin count {sys.argv[3]:>6}: {statistics.median(rates):6,.0f} [{min(rates):,.0f}, {max(rates):,.0f}] tokens/s")
PY
}

for machine in quiet busy; do
    if [ "$machine" = busy ]; then
        (while true; do :; done) &
        trap 'kill %1' EXIT
    fi
    for spins in 300000 10000; do
        measure "$machine" "$spins"
    done
done
