#!/usr/bin/env bash
# Everything to run on a machine with a GPU: checks, tests, benchmarks. Packs what to send back.
#
#   bash benchmarks/gpu.sh                 # long: torch.compile tries many kernels
#   bash benchmarks/gpu.sh --no-compile    # without torch.compile
#   bash benchmarks/gpu.sh --quick         # to see that it works
#
# Options are those of benchmarks/bench_models.py.
set -uo pipefail

cd "$(dirname "$0")/.."
results=gpu-results
python=${PYTHON:-python}
operators=()
[[ " $* " == *" --quick "* ]] && operators=(--limit 2 --seconds 0.2)

"$python" - <<'END' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: error: torch {torch.__version__} finds no CUDA device")
END
mkdir -p "$results"

status=0
step() {
    printf '== %s\n' "$*"
    "$@" 2>&1
}

step "$python" -m threshnet_fast.cli doctor | tee "$results/doctor.txt" || status=1
step "$python" -m pytest -m gpu --junitxml="$results/tests.xml" | tee "$results/tests.txt" || status=1
for operator in cat_bn_relu_conv cat_conv_bn_relu; do
    step "$python" "benchmarks/bench_$operator.py" --device cuda --csv "$results/ops.csv" \
        "${operators[@]}" || status=1
done
step "$python" benchmarks/bench_models.py --device cuda --csv "$results/models.csv" "$@" || status=1

tar -czf "$results.tar.gz" "$results"
printf 'Send back: %s (%s)\n' "$results.tar.gz" "$(cd "$results" && echo ./*)"
exit "$status"
