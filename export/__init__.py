"""From a fine-tuned PyTorch model to a verified ONNX bundle. Runs from a checkout; the wheel does not ship it."""
