"""Asks the service from Python, with nothing but the standard library, and waits where its queue is full.

python examples/http/ask.py [URL]       with a key: export QA_ONNX_API_KEY
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request


def post(url: str, body: dict, attempts: int = 5) -> dict:
    """Posts JSON and returns JSON; asks again when the service says so."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key := os.environ.get("QA_ONNX_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            problem = json.load(error)
            if error.code != 429 or attempt == attempts - 1:
                raise SystemExit(f"{problem['code']}: {problem['detail']}") from error
            time.sleep(int(error.headers["Retry-After"]))
    raise AssertionError("the last attempt returns or raises")


if __name__ == "__main__":
    base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    context = "👑 The Normans were led by Rollo, and settled in Normandy."
    questions = ["Who led the Normans?", "Where did they settle?"]
    found = post(f"{base}/v1/answers", {"items": [{"question": text} for text in questions], "context": context})
    for question, answer in zip(questions, found["answers"], strict=True):
        place = "not in the text" if answer["start"] is None else context[answer["start"] : answer["end"]]
        print(f"{question} {answer['text']} (score {answer['score']:.2f}; in the text: {place})")
