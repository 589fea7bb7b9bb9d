"""A worker for many callers: JSON lines in, JSON lines out as soon as each is answered.

    echo '{"id": 1, "question": "Who led them?", "context": "They were led by Rollo."}' \
        | python examples/async_worker.py BUNDLE

Questions that arrive while others are answered join the same batch. Their fields may have any of the names that
`python -m qa_onnx predict` reads, such as `query` and `passage`.
"""

import asyncio
import json
import sys

from qa_onnx import Answerer, QAOnnxError
from qa_onnx.data.columns import REQUIRED, find_columns


async def main(bundle: str, at_once: int = 256) -> None:
    """Answers standard input until it ends, at most `at_once` questions at a time."""
    room = asyncio.Semaphore(at_once)
    with Answerer.from_pretrained(bundle) as answerer:

        async def handle(line: str) -> None:
            async with room:
                request = json.loads(line)
                try:
                    name_of = find_columns(request, required=REQUIRED, fields=REQUIRED)
                    answer = await answerer.answer_async(request[name_of["question"]], request[name_of["context"]])
                    reply = {"id": request["id"], **answer.to_dict()}
                except QAOnnxError as error:
                    reply = {"id": request["id"], "error": str(error)}
                print(json.dumps(reply, ensure_ascii=False), flush=True)

        async with asyncio.TaskGroup() as tasks:
            while line := await asyncio.to_thread(sys.stdin.readline):
                tasks.create_task(handle(line))


if __name__ == "__main__":
    if len(sys.argv) != 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
