"""What comes over HTTP is what the library gives."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qa_onnx import GenerationConfig
from qa_onnx.serve import schemas
from tests.serve.conftest import CONTEXT, read_events

QUESTIONS = [f"Question {index}?" + " long" * (index % 5) for index in range(40)]
EMOJI = "😀 The Normans were led by Rollo 👩‍👩‍👧, and settled in Normandy. " * 3


def as_json(answer):
    return json.loads(json.dumps(answer.to_dict()))


@pytest.mark.parametrize("context", [CONTEXT, EMOJI, CONTEXT * 30], ids=["short", "emoji", "windows"])
def test_single_batch_and_stream_equal_answer_batch(running, context):
    expected = [as_json(answer) for answer in running.answerer.answer_batch(QUESTIONS, context)]
    items = [{"question": question} for question in QUESTIONS]
    batch = running.client.post("/v1/answers", json={"items": items, "context": context}).json()
    assert batch["answers"] == expected
    for question, answer in zip(QUESTIONS[:8], expected, strict=False):
        assert running.ask(question, context).json()["answer"] == answer
        response = running.ask(question, context, stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event for event in read_events(response.text) if event[0] != ":"]
        assert [name for name, _ in events[:-1]] == ["text"] * (len(events) - 1)
        assert "".join(data["text"] for _, data in events[:-1]) == answer["text"]
        assert events[-1] == ("answer", {"request_id": response.headers["x-request-id"], "answer": answer})


def test_an_answer_of_several_tokens_is_streamed_in_pieces(running):
    events = read_events(running.ask("How long did the Normans stay there?", stream=True).text)
    assert len([name for name, _ in events if name == "text"]) > 3


def test_options_are_those_of_the_library_with_its_defaults(running):
    ours = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    assert {name: field.default for name, field in schemas.Options.model_fields.items()} == ours
    config = GenerationConfig(num_answers=3, max_new_tokens=2)
    expected = running.answerer.answer_batch(QUESTIONS[:2], CONTEXT, config=config)
    assert len(expected[0].alternatives) == 2
    options = {"num_answers": 3, "max_new_tokens": 2}
    assert running.ask(QUESTIONS[0], **options).json()["answer"] == as_json(expected[0])
    items = [{"question": question} for question in QUESTIONS[:2]]
    body = {"items": items, "context": CONTEXT, "options": options}
    assert running.client.post("/v1/answers", json=body).json()["answers"] == list(map(as_json, expected))


def test_offsets_count_code_points(running):
    context = f"😀😀 {QUESTIONS[0]} is asked."
    answer = running.ask(QUESTIONS[0], context).json()["answer"]
    assert context[answer["start"] : answer["end"]] == answer["text"] == QUESTIONS[0]
    assert answer["start"] == 3


def test_items_have_their_own_context_or_the_shared_one(running):
    items = [{"question": "Who?"}, {"question": "Who?", "context": "Who? is asked."}]
    found = running.client.post("/v1/answers", json={"items": items, "context": CONTEXT}).json()["answers"]
    assert [answer["start"] for answer in found] == [None, 0]
    problem = running.client.post("/v1/answers", json={"items": items[::-1]}).json()
    assert problem["code"] == "invalid_request"
    assert "items.1" in problem["detail"]


def test_hugging_face_s_client(running):
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(model=f"{running.url}/hf/question-answering")
    config = GenerationConfig(extractive=True)
    for question in QUESTIONS[:3]:
        (expected,) = running.answerer.answer_batch([question], CONTEXT, config=config)
        found = client.question_answering(question=question, context=CONTEXT)
        assert (found.answer, found.score, found.start, found.end) == (
            expected.text,
            expected.score,
            expected.start or 0,
            expected.end or 0,
        )
    several = client.question_answering(question="Who led them?", context=CONTEXT, top_k=3, max_answer_len=4)
    config = GenerationConfig(extractive=True, num_answers=3, max_new_tokens=4)
    (expected,) = running.answerer.answer_batch(["Who led them?"], CONTEXT, config=config)
    texts = [answer.text for answer in (expected, *expected.alternatives)]
    assert [element.answer for element in several] == texts
    refused = {"inputs": {"question": "Who?", "context": CONTEXT}, "parameters": {"align_to_words": False}}
    assert running.client.post("/hf/question-answering", json=refused).status_code == 422


def test_triton_s_client(running):
    http = pytest.importorskip("tritonclient.http")
    np = pytest.importorskip("numpy")
    client = http.InferenceServerClient(f"127.0.0.1:{running.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert not client.is_model_ready("other")
    assert {one["name"] for one in client.get_model_metadata("echo")["inputs"]} == {"question", "context"}
    expected = running.answerer.answer_batch(QUESTIONS[:5], EMOJI)

    def ask(contexts, **options):
        inputs = []
        for name, texts in (("question", QUESTIONS[:5]), ("context", contexts)):
            tensor = http.InferInput(name, [len(texts)], "BYTES")
            tensor.set_data_from_numpy(np.array(texts, dtype=object), binary_data=False)
            inputs.append(tensor)
        return client.infer("echo", inputs, **options)

    result = ask([EMOJI] * 5)
    assert [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("text")] == [
        answer.text for answer in expected
    ]
    assert result.as_numpy("score").tolist() == [answer.score for answer in expected]
    assert result.as_numpy("start").tolist() == [-1 if one.start is None else one.start for one in expected]
    short = ask([EMOJI] * 5, parameters={"max_new_tokens": 1})
    assert len(short.as_numpy("text")[0]) < len(expected[0].text)
    with pytest.raises(http.InferenceServerException, match="of one shape"):
        ask([EMOJI])
