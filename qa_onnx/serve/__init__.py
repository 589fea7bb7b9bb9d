"""The HTTP service, `python -m qa_onnx serve`: FastAPI on uvicorn. Needs the extra `serve`; loads no torch."""
