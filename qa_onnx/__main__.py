"""Runs the command line: `python -m qa_onnx`."""

import sys

from qa_onnx.cli import main

sys.exit(main())
