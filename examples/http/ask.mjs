// Asks the service from JavaScript (Node 18 or a browser): a stream, and where the answer is in the text.
//   node examples/http/ask.mjs [URL]       with a key: export QA_ONNX_API_KEY
const url = process.argv[2] ?? "http://127.0.0.1:8000";
const key = process.env.QA_ONNX_API_KEY;
const context = "👑 The Normans were led by Rollo, and settled in Normandy.";

const response = await fetch(`${url}/v1/answer`, {
  method: "POST",
  headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
  body: JSON.stringify({ question: "Who led the Normans?", context, stream: true }),
});
if (!response.ok) {
  const problem = await response.json();
  throw new Error(`${problem.code}: ${problem.detail}`);
}

let rest = "";
for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + chunk).split("\n\n");
  rest = events.pop();
  for (const event of events) {
    const found = /^event: (.*)\ndata: (.*)$/.exec(event);
    if (!found) continue; // a comment, which keeps the connection open
    const [, name, json] = found;
    const data = JSON.parse(json);
    if (name === "text") console.log("so far:", data.text);
    if (name === "error") throw new Error(`${data.code}: ${data.detail}`);
    if (name === "answer") {
      const { text, score, start, end } = data.answer;
      // Offsets are Unicode code points; a JavaScript string counts UTF-16 units, so spread it first.
      const place = start === null ? "not in the text" : [...context].slice(start, end).join("");
      console.log(`${text} (score ${score.toFixed(2)}; in the text: ${place})`);
    }
  }
}
