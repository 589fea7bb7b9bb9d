# `make demo` and `make test` install what they need by themselves; the second time they start at once.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

OLDEST = .venv-oldest
OLDEST_RUN = $(OLDEST)/bin/python
HELDOUT = runs/oldest/heldout.json

TRANSFORMERS5 = .venv-transformers5
TRANSFORMERS5_RUN = $(TRANSFORMERS5)/bin/python

.PHONY: demo test check browser test-oldest test-transformers5 test-sanitizers test-distributed coverage bench-peers docs lint licenses format clean

demo: $(INSTALLED)  ## fine-tune, export, answer: the whole path in five to ten minutes
	$(RUN) -m bench.demo

# One worker for each core, a file's tests in one of them, in the order of the folders: the long ones come first.
# Each worker computes on one thread (tests/conftest.py). Tests that measure time run alone, afterwards.
PARALLEL = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not serial"

test: $(INSTALLED)  ## every test that this machine can run; skipped ones say why
	$(RUN) -m pytest $(PARALLEL) --durations=40
	$(RUN) -m pytest -m serial

check: lint  ## what to run before each commit: lint, types and unit tests, in about a minute on two cores
	$(RUN) -m pytest tests/unit -q -r fE --durations=3 $(PARALLEL)

coverage: $(INSTALLED)  ## the lines of the runtime that the unit tests do not run
	$(RUN) -m coverage run --source qa_onnx -m pytest -q tests/unit
	$(RUN) -m coverage report --skip-covered --show-missing --sort cover

browser:  ## Chromium of the system's packages (Debian, as root), in which `make test` tests the page
	@command -v chromium > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; } \
		|| echo "no Chromium: the tests of the page are skipped. Install the package chromium as root"

test-oldest: $(INSTALLED) $(OLDEST)/.installed  ## the oldest ONNX Runtime that pyproject.toml allows gives the same answers
	$(OLDEST_RUN) -m pytest tests/unit -p no:cacheprovider $(PARALLEL)
	rm -rf runs/oldest && mkdir -p runs/oldest
	$(RUN) -m training.starter.sample --split heldout --output $(HELDOUT)
	$(RUN) -m export.to_onnx --model training/starter/model --output runs/oldest/bundle --verify $(HELDOUT)
	$(RUN) -m qa_onnx predict --model runs/oldest/bundle --data $(HELDOUT) --output runs/oldest/newest.json
	$(OLDEST_RUN) -m qa_onnx predict --model runs/oldest/bundle --data $(HELDOUT) --output runs/oldest/oldest.json
	cmp runs/oldest/newest.json runs/oldest/oldest.json

# Both versions train the same model, to the last bit; the export, which needs transformers 4, reads the one of version 5.
TRAINING = -m training.finetune --model starter --train sample --limit-train 64 --limit-eval 8 --max-steps 2 --batch-size 8
test-transformers5: $(INSTALLED) $(TRANSFORMERS5)/.installed  ## training on transformers 5
	$(TRANSFORMERS5_RUN) -m pytest -p no:cacheprovider tests/parity/test_loss.py tests/integration/test_training_runs.py
	rm -rf runs/transformers5
	$(RUN) $(TRAINING) --output runs/transformers5/model-4
	$(TRANSFORMERS5_RUN) $(TRAINING) --output runs/transformers5/model-5
	cmp runs/transformers5/model-4/model.safetensors runs/transformers5/model-5/model.safetensors
	cmp runs/transformers5/model-4/predictions.json runs/transformers5/model-5/predictions.json
	$(RUN) -m export.to_onnx --model runs/transformers5/model-5 --output runs/transformers5/bundle

SANITIZED = runs/sanitized
test-sanitizers: $(INSTALLED)  ## the kernels' tests with AddressSanitizer and UBSan: nothing outside of an array, nothing undefined
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	QA_ONNX_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1" \
		$(RUN) setup.py -q build_ext --build-temp $(SANITIZED)/temp --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(RUN) -m tests.kernels $(SANITIZED)/lib/qa_onnx/kernels/libqa_onnx_kernels.so

DISTRIBUTED = runs/distributed
test-distributed: $(INSTALLED) $(DISTRIBUTED)/.installed  ## the examples on Ray and Spark, with kills; Spark needs Java 17
	$(RUN) -m export.to_onnx --model starter --precision int8 --output $(DISTRIBUTED)/bundle --force
	QA_ONNX_BUNDLE=$(DISTRIBUTED)/bundle $(DISTRIBUTED)/bin/python -m pytest tests/distributed -p no:cacheprovider

$(DISTRIBUTED)/.installed: examples/distributed.txt pyproject.toml
	$(PYTHON) -m venv $(DISTRIBUTED)
	$(DISTRIBUTED)/bin/python -m pip install --quiet --requirement examples/distributed.txt $(EDITABLE) .
	touch $@

# torchvision and its like are built for another torch there, and break transformers.
bench-peers: $(INSTALLED)  ## an environment for each peer of the benchmarks that clashes with this project's packages
	for peer in openvino vllm llama-cpp; do \
		$(PYTHON) -m venv runs/peers/$$peer \
		&& runs/peers/$$peer/bin/python -m pip install --quiet --requirement bench/peers-$$peer.txt \
		|| echo "$$peer cannot be installed: the benchmarks say so in its rows"; \
	done
	for peer in openvino vllm; do \
		runs/peers/$$peer/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	done

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib
	$(RUN) -m mypy

licenses: $(INSTALLED)  ## the packages of .venv with version and license
	$(RUN) -m piplicenses --order=license --format=markdown --with-urls

docs: $(INSTALLED)  ## the documentation site, in runs/site; a broken link or a page outside of the navigation is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# By a path, or a script next to a checkout called qa_onnx would import that folder instead of the package in it.
EDITABLE = --config-settings editable_mode=compat --editable
NATIVE = setup.py $(wildcard qa_onnx/kernels/native/*)

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'qa_onnx needs Python 3.11 or later')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt $(EDITABLE) ".[cpu,train,export,bench,dev,docs]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(OLDEST)
	sed 's/^onnxruntime==.*/onnxruntime==1.25.0/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST_RUN) -m pip install --quiet --constraint $(OLDEST)/constraints.txt $(EDITABLE) ".[cpu,plot]" pytest pytest-xdist filelock hypothesis
	touch $@

$(TRANSFORMERS5)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(TRANSFORMERS5)
	sed -e 's/^transformers==.*/transformers==5.24.0/' -e 's/^tokenizers==.*/tokenizers==0.23.3/' \
		-e 's/^huggingface_hub==.*/huggingface_hub==1.33.0/' constraints.txt > $(TRANSFORMERS5)/constraints.txt
	$(TRANSFORMERS5_RUN) -m pip install --quiet --constraint $(TRANSFORMERS5)/constraints.txt \
		$(EDITABLE) ".[cpu,train,tensorboard]" pytest hypothesis
	touch $@

clean:  ## the environment and what tools left; runs/ stays, models are in it
	rm -rf $(VENV) $(OLDEST) $(TRANSFORMERS5) build dist *.egg-info qa_onnx/kernels/*.so .mypy_cache .pytest_cache .ruff_cache
