#!/usr/bin/env bash
# Measure what the prefix backend gains on this machine, and write one page about it.
#
# Three steps, each of which can be run alone: the attention kernels by themselves, a served model
# with and without the backend, and a report from the result files of both.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: examples/compare.sh DIR [OPTIONS OF `sglang-prefix bench serving`...]

Writes DIR/kernel.json, DIR/serving.json, their plots, and DIR/report.html, which opens from disk.

  DIR    folder for the results. What was measured before an interruption is kept there, and
         `sglang-prefix bench kernel --resume --out DIR`, or the same with serving, goes on.

Measures the kernels first, then the servers, and ends with the page. Draws plots, so it needs
matplotlib: `make install` brings it, and so does `pip install '.[bench]'` in a checkout.

Servers that run already (--stock-url, --prefix-url) and want a key: SGLANG_API_KEY=KEY.

FULL=1 runs all workloads; without it, the few of --quick, which take minutes on a CPU.
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
if [[ $# -eq 0 || "$1" == -* ]]; then
    usage >&2
    echo "compare.sh: name the folder for the results" >&2
    exit 2
fi
if ! command -v sglang-prefix >/dev/null; then
    echo "compare.sh: sglang-prefix is not on PATH; activate its environment (\`source .venv/bin/activate\`), or install it (\`pip install .\` in a checkout)" >&2
    exit 127
fi
out=$1
shift

quick=(--quick)
if [[ "${FULL:-0}" == 1 ]]; then
    quick=()
fi

# Kernels: attention of one layer, ours against every stock backend that loads here.
sglang-prefix bench kernel --out "$out" "${quick[@]}"
# Serving: a stock server and ours in turn, the same requests, tokens compared.
sglang-prefix bench serving --out "$out" "${quick[@]}" "$@"
# One page that shows all of it, losing rows included.
sglang-prefix report "$out" --out "$out/report.html"
echo "open $out/report.html"
