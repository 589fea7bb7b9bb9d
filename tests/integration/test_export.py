"""The export from the command line: what it writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from optimum.onnxruntime import ORTModelForCausalLM

from bench import accuracy
from export import parity, to_onnx
from export import staging as staging_files
from qa_onnx import Answerer, BundleError, cli
from qa_onnx.bundle import Bundle
from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import InvalidInputError
from qa_onnx.lock import folder_lock
from qa_onnx.manifest import write_manifest
from training import finetune


def run_export(*arguments):
    return to_onnx.main([str(argument) for argument in arguments])


def test_a_bundle_holds_what_the_contract_says(tiny_bundle):
    assert {path.name for path in tiny_bundle.iterdir()} == {
        "model.onnx",
        "model.kernels.onnx",
        "model.onnx_data",
        "cache_copy.onnx",
        "tokenizer.json",
        "config.json",
        "qa_onnx.json",
    }
    manifest = json.loads((tiny_bundle / "qa_onnx.json").read_text())
    assert manifest["precision"] == "fp32"
    assert (manifest["layers"], manifest["heads"], manifest["head_size"], manifest["max_positions"]) == (2, 4, 8, 256)
    assert {"torch", "transformers", "optimum", "optimum-onnx", "onnxruntime"} <= manifest["package_versions"].keys()


def test_outputs_are_of_the_last_position_and_the_embedding_is_stored_once(tiny_bundle):
    graph = onnx.load(tiny_bundle / "model.onnx").graph
    outputs = {output.name: output.type.tensor_type.shape.dim for output in graph.output}
    assert [outputs["logprobs"][place].dim_param or outputs["logprobs"][place].dim_value for place in range(2)] == [
        "M",
        600,
    ]
    assert {len(outputs[name]) for name in ("token_ids", "token_logprobs", "eos_logprobs")} == {2}
    assert sum(600 in tensor.dims for tensor in graph.initializer) == 1


def test_optimums_own_export_can_be_kept_and_loads_in_optimum(tiny_model_dir, tmp_path):
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle", "--keep-optimum") == 0
    ORTModelForCausalLM.from_pretrained(tmp_path / "bundle-optimum")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "bundle-optimum"}


def test_an_existing_bundle_is_replaced_only_by_force(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "bundle"
    assert run_export("--model", tiny_model_dir, "--output", output) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"loading {tiny_model_dir}, and exporting it with Optimum\ncomparing ")
    assert re.search(
        r"fp32\)\nparity with PyTorch: \d+ prompts, \d tokens each, all equal; .* differ by at most \d\.\de-0\d\n",
        printed,
    )
    (output / "mark").write_text("first")
    assert run_export("--model", tiny_model_dir, "--output", output) == 2
    assert "--force" in capsys.readouterr().err
    assert (output / "mark").exists()
    assert run_export("--model", tiny_model_dir, "--output", output, "--force") == 0
    assert not (output / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_does_not_delete_what_is_no_bundle(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "thesis", "--force") == 2
    assert "will not delete" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


@pytest.mark.parametrize("moment", ["build_decoder", "verify_parity", "write_manifest", "put_in_place"])
@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "is full; nothing was written. Free some space"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_a_full_disk_or_ctrl_c_leaves_nothing_and_keeps_the_old_bundle(
    tiny_model_dir, tmp_path, monkeypatch, capsys, moment, failure, status, message
):
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "qa_onnx.json").write_text("old")

    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(to_onnx, moment, fail)
    assert run_export("--model", tiny_model_dir, "--output", output, "--force") == status
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (output / "qa_onnx.json").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_sigterm_leaves_nothing(tiny_model_dir, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(to_onnx, "verify_parity", stop)
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_bundle_has_the_modes_of_the_umask(tiny_model_dir, tmp_path):
    before = os.umask(0o022)
    try:
        assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle") == 0
    finally:
        os.umask(before)
    bundle = tmp_path / "bundle"
    assert {path.stat().st_mode & 0o777 for path in bundle.iterdir()} == {0o644}
    assert bundle.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_what_appears_at_the_output_meanwhile_is_kept(tiny_model_dir, tmp_path, monkeypatch, capsys, options):
    output, verify = tmp_path / "bundle", to_onnx.verify_parity

    def appear(*arguments, **named):
        output.mkdir()
        (output / "thesis.txt").write_text("precious")
        return verify(*arguments, **named)

    monkeypatch.setattr(to_onnx, "verify_parity", appear)
    assert run_export("--model", tiny_model_dir, "--output", output, *options) == 2
    assert str(output) in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_one_export_at_a_time_writes_to_a_place(tiny_model_dir, tmp_path, capsys):
    with folder_lock(tmp_path / ".bundle.lock", what="an export"):
        assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle", "--force") == 2
    said = capsys.readouterr().err
    assert f"an export to {tmp_path / 'bundle'} is already running, in process {os.getpid()} " in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_anything_is_written(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(staging_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle") == 2
    assert "MB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_directories_above_a_bundle_are_made(tmp_path):
    output = tmp_path / "runs" / "starter" / "bundle"
    with staging_files.stage(output, weight_bytes=1) as (part,):
        part.mkdir()
        part.rename(output)
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8", "--max-f1-drop", "-1"], "max_f1_drop -1"),
        (["--precision", "int8", "--max-f1-drop", "nan"], "max_f1_drop nan"),
        (["--model", "{nowhere}"], "no model could be loaded"),
        (["--output", "{pickled}/config.json/bundle"], "config.json cannot be made (File exists); choose another"),
        (["--output", "{pickled}/config.json/one/bundle"], "/one cannot be made (Not a directory); choose another"),
        (["--output", "/"], "got --output /; expected a directory to create"),
        (["--model", "{pickled}"], "safetensors"),
        (["--model", "{remote}"], "no model could be loaded"),
        (["--model", "{cut}"], "no model could be loaded"),
        (["--verify", "{nowhere}"], "cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tiny_model_dir, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (pickled / name).write_bytes((tiny_model_dir / name).read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    remote = tmp_path / "remote"  # a model whose code would come along with it
    shutil.copytree(tiny_model_dir, remote)
    settings = json.loads((remote / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (remote / "config.json").write_text(json.dumps(settings))
    (remote / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model_dir, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    places = {"nowhere": tmp_path / "nowhere", "pickled": pickled, "remote": remote, "cut": cut}
    given = [argument.format(**places) for argument in arguments]
    given += [] if "--model" in given else ["--model", str(tiny_model_dir)]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert run_export(*given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pickled", "remote", "cut"}


def test_an_external_data_file_outside_the_bundle_is_not_read(tiny_bundle, tmp_path):
    """A graph can name files with weights (CVE-2024-27318, CVE-2025-51480); only ones of the bundle may be read."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    model = onnx.load(bundle / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if "wte" in tensor.name)
    (tmp_path / "secret.bin").write_bytes(numpy_helper.to_array(tensor).tobytes())
    onnx.external_data_helper.set_external_data(tensor, location="../secret.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "qa_onnx.json").read_text())
    derived = ("format_version", "prompt_template", "no_answer", "scores", "files")
    write_manifest(bundle, {name: value for name, value in manifest.items() if name not in derived})
    with pytest.raises(BundleError, match="which a graph reads, is not listed in the manifest"):
        Answerer.from_pretrained(bundle, provider="cpu")


def test_questions_that_the_model_was_trained_on_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.csv", "heldout.jsonl"):
        Path(name).touch()
    config = Path("training_config.json")
    assert to_onnx._find_trained_on(".", ["own.csv"]) == []  # no model of training.finetune
    config.write_text(json.dumps({"train": ["own.csv", "squad"]}))
    assert to_onnx._find_trained_on(".", ["heldout.jsonl", "own.csv"]) == ["own.csv"]
    assert to_onnx._find_trained_on(".", ["squad"]) == []  # of the hub another split is read
    config.write_text("{}")
    with pytest.raises(InvalidInputError, match="json is not what training"):
        to_onnx._find_trained_on(".", ["own.csv"])


def test_train_export_answer(heldout_file, tmp_path, capsys):
    """The whole path by its commands, on the starter, two steps."""
    model, bundle, predictions = tmp_path / "model", tmp_path / "bundle", tmp_path / "predictions.json"
    trained = finetune.main(
        [
            *("--model", "starter", "--train", "sample", "--eval", str(heldout_file), "--output", str(model)),
            *("--max-steps", "2", "--limit-train", "32", "--limit-eval", "4"),
        ]
    )
    assert trained == 0
    assert run_export("--model", model, "--output", bundle, "--verify", heldout_file) == 0
    *_, threshold, scores = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"no-answer threshold: 0\.\d+, found on 120 questions", threshold)  # half of them made
    assert re.fullmatch(r"scores are calibrated on 60 questions", scores)
    assert cli.main(["predict", "--model", str(bundle), "--data", str(heldout_file), "--output", str(predictions)]) == 0
    assert len(json.loads(predictions.read_text())) == 60
    assert cli.main(["evaluate", "--data", str(heldout_file), "--predictions", str(predictions)]) == 0
    result = tmp_path / "accuracy.json"
    compared = accuracy.main(
        [*("--model", str(bundle), "--torch", str(model)), *("--data", str(heldout_file), "--output", str(result))]
    )
    assert compared == 0
    assert json.loads(result.read_text())["texts_differing_from_torch"] == 0


def test_the_gates_batches_are_bounded_in_rows_and_tokens_and_hold_every_prompt_in_order():
    references = [
        parity.Reference(prompt=Prompt(prefix_ids=[], suffix_ids=[0] * n), tokens=[], logprobs=np.empty(0))
        for n in (3, 900, 40, 1017, 5, 6)
    ]
    batches = parity._batches(references, 3)
    assert [len(row.prompt) for batch in batches for row in batch] == [3, 900, 40, 1017, 5, 6]
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert [len(batch) for batch in parity._batches(references, 1)] == [1] * 6


@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_a_staging_directory_of_somebody_else_is_kept(tiny_model_dir, tmp_path, capsys, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    staging = tmp_path / ".bundle.staging"
    if kind == "directory":
        (tmp_path / "precious").rename(staging)
    elif kind == "link":
        staging.symlink_to("precious")
    else:
        staging.write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle") == 2
    assert ".bundle.staging exists and was not made by an export; move it" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_export_left_is_cleared_and_what_it_replaced_is_put_back(tiny_model_dir, tmp_path, monkeypatch):
    staging = tmp_path / ".bundle.staging"
    (staging / "bundle-replaced").mkdir(parents=True)
    (staging / staging_files.STAGING_MARK).touch()
    (staging / "bundle-replaced" / "qa_onnx.json").write_text("old")
    (tmp_path / ".bundle.lock").write_text("1234\n")

    def fail(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(to_onnx, "verify_parity", fail)
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "bundle") == 130
    assert (tmp_path / "bundle" / "qa_onnx.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("exists", [True, False])
def test_an_export_to_a_link_goes_where_it_leads(tiny_model_dir, tmp_path, exists):
    if exists:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "qa_onnx.json").write_text("old")
    (tmp_path / "link").symlink_to("real")
    assert run_export("--model", tiny_model_dir, "--output", tmp_path / "link", *(["--force"] if exists else [])) == 0
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}
    Bundle.open(tmp_path / "real")


def test_a_link_to_itself_is_refused_at_the_start(tmp_path, capsys):
    (tmp_path / "link").symlink_to("link")
    assert run_export("--model", "nowhere", "--output", tmp_path / "link", "--force") == 2
    assert "link is a link to nothing" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()
