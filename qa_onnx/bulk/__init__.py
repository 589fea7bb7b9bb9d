"""Files of questions to files of answers, for as many rows as there are: `python -m qa_onnx answer-file`."""
