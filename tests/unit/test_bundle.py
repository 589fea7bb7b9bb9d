from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import manifest_fields, write_json

from qa_onnx.bundle import Bundle
from qa_onnx.errors import BundleError
from qa_onnx.manifest import sha256_of, write_manifest
from qa_onnx.text.prompt import PROMPT_TEMPLATE

ABSENT = object()


@pytest.fixture
def bundle(tmp_path):
    directory = tmp_path / "bundle"
    directory.mkdir()
    for name in (
        "model.onnx",
        "model.kernels.onnx",
        "cache_copy.onnx",
        "tokenizer.json",
        "config.json",
        "model.onnx_data",
    ):
        (directory / name).write_bytes(f"content of {name}".encode())
    write_manifest(directory, manifest_fields(parity={"questions": 64}))
    return directory


def edit_manifest(bundle, **changes):
    path = bundle / "qa_onnx.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in values.items() if value is not ABSENT})


def list_file(bundle, name, content):
    files = json.loads((bundle / "qa_onnx.json").read_text(encoding="utf-8"))["files"]
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, files=files)


def problem_of(bundle):
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert str(bundle) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(bundle):
    opened = Bundle.open(str(bundle))
    content = b"content of config.json"
    assert opened.manifest.format_version == 7
    assert opened.manifest.prompt_template == PROMPT_TEMPLATE
    assert opened.manifest.files["config.json"] == {"bytes": 22, "sha256": hashlib.sha256(content).hexdigest()}
    assert sorted(opened.manifest.files) == [
        "cache_copy.onnx",
        "config.json",
        "model.kernels.onnx",
        "model.onnx",
        "model.onnx_data",
        "tokenizer.json",
    ]
    assert opened.manifest.to_dict() | manifest_fields(parity={"questions": 64}) == opened.manifest.to_dict()
    assert (opened.graph_path(), opened.tokenizer_path) == (bundle / "model.onnx", bundle / "tokenizer.json")
    assert opened.graph_path(has_kernels=True) == bundle / "model.kernels.onnx"
    assert opened.cache_copy_path == bundle / "cache_copy.onnx"


def test_a_manifest_does_not_list_itself_when_written_again(bundle):
    assert write_manifest(bundle, manifest_fields()) == Bundle.open(bundle).manifest


@pytest.mark.parametrize("name", ["model.onnx", "cache_copy.onnx", "tokenizer.json", "config.json", "model.onnx_data"])
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    assert f"{name}: missing" in problem_of(bundle)


def test_a_directory_in_place_of_a_file_is_missing(bundle):
    (bundle / "config.json").unlink()
    (bundle / "config.json").mkdir()
    assert "config.json: missing" in problem_of(bundle)


def test_a_truncated_file_is_named_with_both_sizes(bundle):
    (bundle / "model.onnx").write_bytes(b"content")
    assert "model.onnx: 7 bytes instead of 21" in problem_of(bundle)


def test_one_altered_byte_is_found(bundle):
    (bundle / "model.onnx").write_bytes(b"Content of model.onnx")
    assert "model.onnx: wrong SHA-256" in problem_of(bundle)


def test_all_problems_are_in_one_error_with_the_way_out(bundle):
    (bundle / "model.onnx").unlink()
    (bundle / "tokenizer.json").write_bytes(b"short")
    (bundle / "config.json").write_bytes(b"Content of config.json")
    problem = problem_of(bundle)
    for words in ("model.onnx: missing", "tokenizer.json: 5 bytes", "config.json: wrong SHA-256", "export.to_onnx"):
        assert words in problem


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.kernels.onnx", "cache_copy.onnx", "tokenizer.json", "config.json"]
)
def test_a_required_file_has_to_be_listed(bundle, name):
    files = json.loads((bundle / "qa_onnx.json").read_text(encoding="utf-8"))["files"]
    del files[name]
    edit_manifest(bundle, files=files)
    assert f"{name}: not listed" in problem_of(bundle)


@pytest.mark.parametrize(
    "name", ["../x", "sub/x", "./x", "..", ".", "", "sub\\x", "/etc/hostname", "x" * 300, "x\x00", "\ud800"]
)
def test_file_names_cannot_leave_the_directory(bundle, name):
    (bundle / "sub").mkdir()
    for path in (bundle / "sub" / "x", bundle / "x", bundle / "sub\\x", bundle.parent / "x"):
        path.write_bytes(b"x")
    list_file(bundle, name, b"x")
    words = "cannot be read|missing" if name[0:1] in ("x", "\ud800") else "not a plain file name"
    assert re.search(words, problem_of(bundle))


def test_an_absolute_file_name_is_refused_though_the_file_is_inside(bundle):
    list_file(bundle, str(bundle / "model.onnx"), b"content of model.onnx")
    assert "not a plain file name" in problem_of(bundle)


def test_files_may_be_links_as_in_the_cache_of_the_hub(bundle):
    blobs, snapshot = bundle.parent / "blobs", bundle.parent / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(bundle.iterdir())):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    assert Bundle.open(snapshot).graph_path() == snapshot / "model.onnx"


def test_files_may_be_links_as_in_a_volume_of_kubernetes(bundle):
    volume = bundle.parent / "volume"
    volume.mkdir()
    bundle.rename(volume / "..2026_11_25")
    (volume / "..data").symlink_to("..2026_11_25")
    for path in (volume / "..2026_11_25").iterdir():
        (volume / path.name).symlink_to(f"..data/{path.name}")
    Bundle.open(volume)


def test_the_checksum_decides_on_what_a_link_leads_to(bundle):
    (bundle.parent / "other").write_bytes(b"Content of model.onnx")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(bundle.parent / "other")
    assert "model.onnx: wrong SHA-256" in problem_of(bundle)
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("model.onnx")
    assert "model.onnx: missing" in problem_of(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "qa_onnx.json"])
def test_a_file_of_another_user_is_named(bundle, name, monkeypatch):
    """Root reads every file, so that the refusal is simulated where it opens."""
    is_refused = (bundle / name).__eq__

    def refuse(path, *arguments, **options):
        if is_refused(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    problem = problem_of(bundle)
    assert name in problem
    assert "Permission denied" in problem


def test_a_bundle_may_be_reached_through_a_link_and_link_inside_itself(bundle):
    (bundle / "model.onnx").rename(bundle / "graph.onnx")
    (bundle / "model.onnx").symlink_to("graph.onnx")
    (bundle.parent / "latest").symlink_to(bundle)
    Bundle.open(bundle.parent / "latest")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 8, "7", None, ABSENT, True])
def test_another_format_version_means_to_export_again(bundle, version):
    edit_manifest(bundle, format_version=version)
    problem = problem_of(bundle)
    assert f"format_version {None if version is ABSENT else version!r}" in problem
    assert "reads 7" in problem
    assert "Export the model again" in problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": ABSENT}, ["heads is missing"]),
        ({"files": ABSENT}, ["files is missing"]),
        ({"colour": "red"}, ["colour is not a known field"]),
        ({"heads": "12"}, ["heads should be int, got '12'"]),
        ({"heads": True}, ["heads should be int, got True"]),
        ({"max_positions": 1.5}, ["max_positions should be int, got 1.5"]),
        ({"windows": "none"}, ["windows should be dict, got 'none'"]),
        ({"windows": {"window": 4}}, ["windows: "]),
        ({"scores": {"slope": -1.0}}, ["scores.slope is -1.0; expected a number from 0 on"]),
        ({"scores": {"intercept": "0"}}, ["scores.intercept is '0'; expected a number from -inf on"]),
        ({"files": []}, ["files should be dict, got []"]),
        ({"source_model": None}, ["source_model should be str, got None"]),
        ({"heads": 0}, ["heads is 0, not a number from 1 to 4096"]),
        ({"layers": 1001}, ["layers is 1001, not a number from 1 to 1000"]),
        ({"max_positions": 2**20 + 1}, ["max_positions is 1048577, not a number from 1 to 1048576"]),
        ({"vocab_size": 2**24 + 1}, ["vocab_size is 16777217, not a number from 1 to 16777216"]),
        ({"layers": 10**9}, ["layers is 1000000000, not a number from 1 to 1000"]),
        ({"vocab_size": 10**30}, ["vocab_size is 1000000000000000000000000000000, not a number from"]),
        ({"heads": "9" * 10**5}, ["heads should be int, got '99999", "99...."]),
        ({"eos_token_id": 400}, ["eos_token_id 400 is not one of 400 tokens"]),
        ({"eos_token_id": -1}, ["eos_token_id -1 is not one of 400 tokens"]),
        ({"no_answer": {"threshold": 1.5}}, ["no_answer.threshold is 1.5, not a probability"]),
        ({"no_answer": {"threshold": "0.5"}}, ["no_answer.threshold is '0.5', not a probability"]),
        ({f"unknown{index}": 1 for index in range(1000)}, ["unknown0 is not a known field", "and 990 more"]),
        ({"precision": "int3"}, ["precision 'int3' is not one of fp32"]),
        ({"prompt_template": "{question}"}, ["prompt_template is '{question}', not 'Context: "]),
        ({"heads": ABSENT, "layers": "1", "colour": 1}, ["heads is missing", "layers should be int", "colour is not"]),
    ],
)
def test_wrong_fields_are_named_all_at_once(bundle, changes, words):
    edit_manifest(bundle, **changes)
    problem = problem_of(bundle)
    assert [word for word in words if word not in problem] == []
    assert "Export the model again" in problem
    assert len(problem) < 1500


@pytest.mark.parametrize("listed", [None, 21, "model", {}, {"bytes": 21}, {"sha256": "0"}, {"bytes": "21"}])
def test_a_file_entry_without_size_or_checksum_does_not_pass(bundle, listed):
    files = json.loads((bundle / "qa_onnx.json").read_text(encoding="utf-8"))["files"]
    edit_manifest(bundle, files=files | {"model.onnx": listed})
    assert re.search(r"model\.onnx: (21 bytes instead of|wrong SHA-256)", problem_of(bundle))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"format_version": 7,', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"parity": NaN}', "cannot be read as JSON (NaN is not JSON)"),
        (b'{"parity": -Infinity}', "cannot be read as JSON (-Infinity is not JSON)"),
        (b'{"layers": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b" " * 2**20 + b"{}", "has 1048578 bytes; expected at most 1048576"),
    ],
    ids=["cut", "empty", "not UTF-8", "deep", "array", "NaN", "infinity", "long number", "large"],
)
def test_a_manifest_that_is_no_json_object_is_named(bundle, content, words):
    (bundle / "qa_onnx.json").write_bytes(content)
    problem = problem_of(bundle)
    assert f"qa_onnx.json {words}" in problem
    assert "export the bundle again" in problem


def test_counts_and_sizes_up_to_the_limits_are_read(bundle):
    counts = {"layers": 1000, "max_positions": 2**20, "vocab_size": 2**24}
    edit_manifest(bundle, **counts)
    path = bundle / "qa_onnx.json"
    path.write_bytes(path.read_bytes().ljust(2**20))
    manifest = Bundle.open(bundle).manifest
    assert {name: getattr(manifest, name) for name in counts} == counts


def enlarge(bundle, name, size):
    """Makes a file larger, of zeros, with its checksum."""
    with (bundle / name).open("r+b") as file:
        file.truncate(size)
    files = json.loads((bundle / "qa_onnx.json").read_text(encoding="utf-8"))["files"]
    edit_manifest(bundle, files=files | {name: {"bytes": size, "sha256": sha256_of(bundle / name)}})


def test_a_configuration_of_more_than_its_limit_is_refused(bundle):
    enlarge(bundle, "config.json", 2**20 + 1)
    with pytest.raises(BundleError, match=r"config\.json has 1048577 bytes; expected at most 1048576"):
        Bundle.open(bundle).check_files()


def test_a_tokenizer_of_more_than_its_limit_is_refused(bundle):
    enlarge(bundle, "tokenizer.json", 64 * 2**20 + 1)
    with pytest.raises(BundleError, match=r"tokenizer\.json has 67108865 bytes; expected at most 67108864"):
        Bundle.open(bundle).load_tokenizer()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize(
    ("mode", "name"), [(0o700, "."), (0o600, "."), (0o600, "qa_onnx.json"), (0o600, "model.onnx_data")]
)
def test_what_another_user_may_not_read_is_named(bundle, mode, name):
    for parent in (bundle, *bundle.parents):
        if parent.owner() == "root" and parent.name and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (bundle / name).chmod(mode)
    code = (
        "import os, sys; from qa_onnx.bundle import Bundle\nos.setgid(65534); os.setuid(65534)\n"
        "try: Bundle.open(sys.argv[1])\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("BundleError ")
    assert "cannot be read" in done.stdout
    assert "Permission denied" in done.stdout
    assert name == "." or name in done.stdout


def test_a_byte_order_mark_is_no_part_of_a_manifest(bundle):
    path = bundle / "qa_onnx.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    Bundle.open(bundle)


def test_what_is_no_bundle_at_all_is_said(tmp_path):
    assert "there is no such directory" in problem_of(tmp_path / "nowhere")
    assert "it has no qa_onnx.json" in problem_of(tmp_path)
    file = write_json(tmp_path / "file", {})
    assert "export.to_onnx" in problem_of(file)


def test_a_kept_threshold_goes_to_the_manifest_alone(bundle, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (bundle / "qa_onnx.json.partial").symlink_to(tmp_path / "victim")
    Bundle.open(bundle).keep({"no_answer": {"threshold": 0.25}})
    assert Bundle.open(bundle).manifest.no_answer_threshold == 0.25
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_manifest_that_cannot_be_written_is_named_and_unchanged(bundle, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = (bundle / "qa_onnx.json").read_bytes()
    with pytest.raises(BundleError, match=r"qa_onnx.json: cannot be written \(No space left"):
        Bundle.open(bundle).keep({"no_answer": {"threshold": 0.25}})
    assert (bundle / "qa_onnx.json").read_bytes() == before


@pytest.mark.parametrize("path", [None, 5, b"bundle", ["bundle"]])
def test_a_path_has_to_be_one(path):
    with pytest.raises(BundleError, match=f"got a bundle of type {type(path).__name__}; expected the path"):
        Bundle.open(path)
