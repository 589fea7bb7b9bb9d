"""The files for containers parse, and start the service with options that it has. No image is built here."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess

import pytest

from qa_onnx.cli import make_parser
from qa_onnx.serve.config import ServeConfig
from tests.conftest import ROOT
from tests.serve.page_service import KEY

yaml = pytest.importorskip("yaml")


def entry_point(name):
    text = (ROOT / name).read_text()
    return ast.literal_eval(re.search(r"^ENTRYPOINT (\[.*\])$", text, flags=re.MULTILINE)[1])


def parse(command):
    assert command[:3] == ["python", "-m", "qa_onnx"]
    return make_parser().parse_args(command[3:])


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images(name):
    text = (ROOT / name).read_text()
    assert parse(entry_point(name)).host == "0.0.0.0"
    assert text.index("USER 10001") < text.index("ENTRYPOINT")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE):
        sources = shlex.split(line)[:-1]
        allowed = (ROOT / ".dockerignore").read_text().split()
        assert [source for source in sources if not (ROOT / source).exists() or f"!{source}" not in allowed] == []
    check = ast.literal_eval(
        re.search(r"HEALTHCHECK .*\\\n +(\[.*\])$", text, flags=re.MULTILINE)[1].removeprefix("CMD")
    )
    compile(check[2], "health check", "exec")


def test_compose():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["qa_onnx"]
    options = parse([*entry_point("Dockerfile"), *service["command"]])
    assert int(re.match(r"\d+", service["stop_grace_period"])[0]) > options.drain_seconds
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_kubernetes():
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = parse([*entry_point("Dockerfile"), *container["args"]])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > sleep + options.drain_seconds
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": options.port}
    assert pod["metadata"]["annotations"]["prometheus.io/path"] == "/metrics"
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == options.port


@pytest.mark.parametrize("name", ["ask.sh", "ask.mjs", "ask.py"])
def test_clients(running, name):
    command = {"ask.sh": "sh", "ask.mjs": "node", "ask.py": "python3"}[name]
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    ask([command, ROOT / "examples" / "http" / name, running.url])


def ask(command, env=None):
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Who led the Normans?" in done.stdout


def test_the_shell_client_keeps_its_key_off_the_command_line(start, tmp_path):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    running = start(config=ServeConfig(port=0, api_keys=(KEY,)))
    wrapper, commands = tmp_path / "curl", tmp_path / "commands"
    wrapper.write_text(f'#!/bin/sh\necho "$*" >> {commands}\nexec {curl} "$@"\n')
    wrapper.chmod(0o755)
    ask(
        ["sh", ROOT / "examples" / "http" / "ask.sh", running.url],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "QA_ONNX_API_KEY": KEY},
    )
    assert running.url in commands.read_text()
    assert KEY not in commands.read_text()
