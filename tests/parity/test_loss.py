"""The loss at labelled positions only is transformers' loss, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import transformers

from qa_onnx.squad import parse_squad
from training.data import Collator, tokenize
from training.model import load_model
from training.starter.sample import generate


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_loss_and_gradients_are_those_of_transformers(tiny_model_dir, loss_on):
    model, tokenizer = load_model(str(tiny_model_dir))
    reference = transformers.GPT2LMHeadModel.from_pretrained(tiny_model_dir)
    examples = parse_squad(generate("train", questions=6), source="sample")
    rows = tokenize(examples, tokenizer, loss_on=loss_on, max_positions=256)
    batch = Collator(pad_token_id=0)([rows[index] for index in range(len(rows))])
    losses = []
    for network in (model.eval(), reference.eval()):
        loss = network(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
