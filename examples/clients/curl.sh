#!/usr/bin/env bash
# The routes of a served model: bash examples/clients/curl.sh
set -euo pipefail
url=${WEITIAO_URL:-http://127.0.0.1:8000/v1}
key=${OPENAI_API_KEY:-EMPTY}
say() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $key" -H "Content-Type: application/json" "$@"; echo; }

say "$url/models"
say "$url/tasks"
model=${WEITIAO_MODEL:-demo}
say "$url/chat/completions" -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"你好\"}], \"max_tokens\": 32}"
say --no-buffer "$url/chat/completions" -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"你好\"}], \"max_tokens\": 32, \"stream\": true}"
say "${url%/v1}/health"
