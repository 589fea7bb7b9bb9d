# The service on the CPU. The bundle is a volume at /bundle, or baked in: see docs/guides/serving.md.
#   docker build -t qa_onnx .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/BUNDLE:/bundle:ro" -e QA_ONNX_API_KEY=... qa_onnx
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt MANIFEST.in README.md LICENSE ./
COPY qa_onnx qa_onnx
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[cpu,serve,pdf]"

FROM python:3.11-slim-bookworm
COPY --from=build /venv /venv
RUN useradd --system --uid 10001 --no-create-home qa_onnx
USER 10001
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
# The main process is Python itself, so that SIGTERM drains it.
ENTRYPOINT ["python", "-m", "qa_onnx", "serve", "--model", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
