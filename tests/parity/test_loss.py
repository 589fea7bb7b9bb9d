"""The loss at labelled positions only is transformers' loss, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import transformers

from qa_onnx.data.squad import parse_squad
from training.data import Collator, RowSettings, tokenize
from training.model import add_lora, load_model, merge_lora
from training.starter.sample import generate


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_loss_and_gradients_are_those_of_transformers(tiny_model_dir, loss_on):
    model, tokenizer = load_model(str(tiny_model_dir))
    reference = transformers.GPT2LMHeadModel.from_pretrained(tiny_model_dir)
    examples = parse_squad(generate("train", questions=6), source="sample")
    rows = tokenize(examples, tokenizer, RowSettings(loss_on=loss_on, max_positions=256))
    batch = Collator(pad_token_id=0)([rows[index] for index in range(len(rows))])
    losses = []
    for network in (model.eval(), reference.eval()):
        loss = network(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_packed_questions_give_the_loss_and_the_gradients_of_rows_of_their_own(tiny_model_dir, batch_rows):
    model, tokenizer = load_model(str(tiny_model_dir))
    examples = parse_squad(generate("train", questions=40), source="sample")
    for example in examples[::2]:  # lengths are mixed anyway; this mixes the order of the passages, too
        examples.append(example)
    found = []
    for packing in (False, True):
        rows = list(tokenize(examples, tokenizer, RowSettings(max_positions=256, packing=packing)))
        assert (max(len(row["question_tokens"]) for row in rows) > 2) == packing
        counted = sum(label != -100 for row in rows for label in row["labels"])
        collator, loss = Collator(pad_token_id=0, packing=packing), 0.0
        model.eval().zero_grad()
        for start in range(0, len(rows), batch_rows):
            part = model(**collator(rows[start : start + batch_rows]), num_items_in_batch=counted).loss
            part.backward()
            loss += part.item()
        found.append((loss, [parameter.grad.clone() for parameter in model.parameters()], counted))
    (loss, gradients, counted), (packed_loss, packed_gradients, packed_counted) = found
    assert packed_counted == counted
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_label_smoothing_is_that_of_pytorch_over_the_labelled_tokens(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    reference = transformers.GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()
    examples = parse_squad(generate("train", questions=6), source="sample")
    batch = Collator(pad_token_id=0)(list(tokenize(examples, tokenizer, RowSettings(max_positions=256))))
    model.label_smoothing = 0.2
    labels = batch.pop("labels")
    logits = reference(**batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
    assert model.eval()(**batch, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_merged_model_computes_what_the_model_with_lora_does(tiny_model_dir):
    model, _ = load_model(str(tiny_model_dir))
    reference = transformers.GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()
    torch.manual_seed(0)
    adapted = add_lora(model, rank=4, alpha=8.0, dropout=0.0).eval()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:  # these begin with zeros
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 600, (3, 20))
    with torch.inference_mode():
        logits, merged_logits = adapted(input_ids=ids).logits, merge_lora(adapted)(input_ids=ids).logits
        torch.testing.assert_close(merged_logits, logits, atol=1e-3, rtol=1e-4)
        assert (merged_logits - reference(input_ids=ids).logits).abs().max() > 0.1
    assert not any("lora" in name for name in merge_lora(adapted).state_dict())
