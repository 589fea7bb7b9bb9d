from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"qa_onnx", "training", "export", "bench"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Every module that a file imports, at any depth of nesting, by its full dotted name."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])])


def files_of(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    return paths


@pytest.mark.parametrize("module", ["qa_onnx", "qa_onnx.cli", "qa_onnx.checkpoint"])
def test_the_runtime_is_imported_without_the_training_stack(module):
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"qa_onnx", "numpy", "tokenizers"} <= loaded
    assert (
        loaded
        & {
            "torch",
            "transformers",
            "datasets",
            "optimum",
            "onnx",
            "matplotlib",
            "pyarrow",
            "training",
            "export",
            "bench",
        }
        == loaded & {"safetensors", "huggingface_hub", "peft"}
        == set()
    )


@pytest.mark.parametrize("path", files_of("qa_onnx"), ids=module_name)
def test_the_runtime_imports_only_its_few_dependencies(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    optional = {
        "error_analysis.py": {"matplotlib"},
        "tables.py": {"datasets", "pyarrow"},
        "hub.py": {"huggingface_hub"},
        "pdf_worker.py": {"pypdf"},
    }.get(path.name, set())
    if path.parent.name == "serve":  # its extra; the command imports the others when it runs
        roots -= {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"}
    if path.parent.name == "bulk":  # the extra of that name
        roots -= {"pyarrow"}
    if path.parent.name == "checkpoint":  # which training and export load models with
        roots -= {"torch", "transformers", "safetensors", "huggingface_hub"}
    assert roots - sys.stdlib_module_names - {"qa_onnx", "numpy", "tokenizers", "onnxruntime"} == optional


@pytest.mark.parametrize("path", files_of("qa_onnx/engine"), ids=module_name)
def test_the_engine_knows_no_question_answer_or_text(path):
    below = {"qa_onnx.engine", "qa_onnx.config", "qa_onnx.errors", "qa_onnx.kernels"}
    ours = {".".join(name.split(".")[:2]) for name in imports_of(path) if name.partition(".")[0] == "qa_onnx"}
    assert ours <= below


@pytest.mark.parametrize("path", files_of("qa_onnx/serve"), ids=module_name)
def test_the_service_knows_the_answerer_and_what_it_takes_and_gives_only(path):
    below = {f"qa_onnx.{name}" for name in ("answer", "answerer", "config", "errors", "serve")}
    ours = {".".join(name.split(".")[:2]) for name in imports_of(path) if name.startswith("qa_onnx.")}
    assert ours <= below


@pytest.mark.parametrize("path", [*files_of("qa_onnx/text"), *files_of("qa_onnx/evaluation")], ids=module_name)
def test_text_and_evaluation_know_no_answerer(path):
    above = {f"qa_onnx.{name}" for name in ("answerer", "request", "search", "loop", "cli")}
    assert above & set(imports_of(path)) == set()


@pytest.mark.parametrize("path", [ROOT / "qa_onnx" / "batch.py", *files_of("qa_onnx/bulk")], ids=module_name)
def test_bulk_work_touches_the_answerer_only(path):
    inside = {f"qa_onnx.{name}" for name in ("engine", "text", "loop", "request", "search", "cli", "kernels")}
    assert {name for name in imports_of(path) if name.startswith(tuple(inside))} == set()


@pytest.mark.parametrize(("package", "allowed"), [("training", {"qa_onnx"}), ("export", {"qa_onnx"})])
def test_packages_import_only_towards_the_runtime(package, allowed):
    roots = {name.partition(".")[0] for path in files_of(package) for name in imports_of(path)}
    assert roots & OURS - {package} == allowed


def test_imports_inside_the_runtime_make_no_circle():
    modules = {module_name(path): path for path in files_of("qa_onnx")}
    graph = {name: {target for target in imports_of(path) if target in modules} for name, path in modules.items()}
    assert graph["qa_onnx"] >= {"qa_onnx.answerer", "qa_onnx.errors"}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it
