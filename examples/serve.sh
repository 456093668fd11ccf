#!/usr/bin/env bash
# Start an SGLang server that decodes with the prefix backend.
#
# What it adds to a plain `sglang serve` is one flag, --decode-attention-backend prefix. The rest is
# for hosts without a GPU: `sglang-prefix exec` lets SGLang start there, --device cpu tells it to,
# and a tiny random model stands in for a real one.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: examples/serve.sh [MODEL] [OPTIONS OF `sglang serve`...]

Starts a server with the prefix backend in the foreground; Ctrl-C ends it.

  MODEL    a model's folder or its name on the Hugging Face hub; without one, a tiny random model
           is written to ./tiny and served

examples:
  examples/serve.sh                                        # tiny model on http://127.0.0.1:30000
  examples/serve.sh meta-llama/Llama-3.1-8B-Instruct --port 31000 --enable-metrics

With --api-key KEY, clients need the key: the other examples and `sglang-prefix` take --api-key, or
read SGLANG_API_KEY, then OPENAI_API_KEY.
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
if ! command -v sglang-prefix >/dev/null; then
    echo "serve.sh: sglang-prefix is not on PATH; activate its environment (\`source .venv/bin/activate\`), or install it (\`pip install .\` in a checkout)" >&2
    exit 127
fi

if [[ $# -gt 0 && "$1" != -* ]]; then
    model=$1
    shift
else
    model=tiny
    if [[ ! -f tiny/config.json ]]; then
        sglang-prefix tiny-model tiny
    fi
fi

device=()
if [[ ! -e /dev/nvidiactl && ! -e /dev/kfd ]]; then
    device=(--device cpu)
fi

# Your options come last, so that they win over ours.
command=(sglang-prefix exec -- sglang serve --model-path "$model" "${device[@]}"
    --decode-attention-backend prefix "$@")
# Without the key, which would stay in the terminal and in logs.
echo "+ ${command[*]}" | sed -E 's/(--(admin-)?api-key[= ])[^ ]+/\1***/g' >&2
exec "${command[@]}"
