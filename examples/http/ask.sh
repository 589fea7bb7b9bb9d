#!/bin/sh
# Asks the service with curl: one question, a stream, several questions of one text.
#   sh examples/http/ask.sh [URL]          with a key: export QA_ONNX_API_KEY
set -eu
url="${1:-http://127.0.0.1:8000}"
ask() {
    # The key goes through a pipe: every user of the machine can read a command line.
    printf '%s\n' "${QA_ONNX_API_KEY:+Authorization: Bearer $QA_ONNX_API_KEY}" |
        curl --silent --show-error --fail-with-body --no-buffer "$url$1" \
            --header 'Content-Type: application/json' --header @- --data "$2"
    echo
}
ask /v1/answer '{"question": "Who led the Normans?", "context": "The Normans were led by Rollo."}'
ask /v1/answer '{"question": "Who led the Normans?", "context": "The Normans were led by Rollo.", "stream": true}'
ask /v1/answers '{
    "context": "The Normans were led by Rollo, and settled in Normandy.",
    "items": [{"question": "Who led the Normans?"}, {"question": "Where did they settle?"}],
    "options": {"extractive": true, "num_answers": 2}
}'
