"""What a browser sees: the page at `/`, and the API's description at `/docs`. Nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from qa_onnx.serve.security import content_security_policy

router = APIRouter(include_in_schema=False)
STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;"
    "border-bottom:1px solid #8886}code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}"
)


@router.get("/")
async def page() -> Response:
    """The page, where the package has it; else the API's description."""
    html = _read_page()
    return RedirectResponse("/docs", status_code=307) if html is None else _html(html)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API's description."""
    return _html(request.app.state.docs)


@cache
def _read_page() -> str | None:
    file = resources.files("qa_onnx.serve") / "page.html"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _html(html: str) -> Response:
    headers = {
        "Content-Security-Policy": _policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)


_policy = cache(content_security_policy)


def write_docs(document: dict[str, Any]) -> str:
    """A page about each route of an OpenAPI document: what it takes, gives, and what may go wrong."""
    schemas = document["components"]["schemas"]
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qa_onnx API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><main>'
        f"<h1>qa_onnx {escape(document['info']['version'])}</h1><p>{_text(document['info']['description'])}</p>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{_text(operation.get('description', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                parts.append(_table("Request", body["schema"], schemas))
            answer = operation["responses"]["200"].get("content", {}).get("application/json")
            if answer and "$ref" in answer["schema"]:
                parts.append(_table("Response", answer["schema"], schemas))
    parts.append(_table("Problems", {"$ref": "#/components/schemas/ProblemDetails"}, schemas))
    return "".join([*parts, "</main></body></html>"])


def _table(title: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    name = schema["$ref"].rpartition("/")[2]
    required = schemas[name].get("required", [])
    rows = ""
    for field, given in schemas[name]["properties"].items():
        kind = _kind(given) + ("" if field in required else ", optional")
        cells = [f"<code>{escape(field)}</code>", escape(kind), _text(given.get("description", ""))]
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f"<h3>{title}</h3><table><tr><th>Field</th><th>Type</th><th>What it is</th></tr>{rows}</table>"


def _text(markdown: str) -> str:
    """A description as HTML: what is in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(markdown))


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type") or schema.get("$ref", "any").rpartition("/")[2])
