# make demo    sets everything up, compiles the reference model, draws the comparison
# make test    sets everything up, runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STEPS ?= 60000
DECAY ?= 12000

.PHONY: demo test test-wheel test-slow test-portable lint format bench train train-emoji clean

demo: $(STAMP)
	$(BIN)/ditc demo

# a process of tests for each core, and so one thread of torch in each; what they share is made once (tests/conftest.py)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist worksteal --durations 10

# the wheel in an environment of its own: asks the package registry, as a user's pip does
test-wheel: $(STAMP)
	$(BIN)/pytest -m wheel tests/wheel

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not wheel" --timeout 3600

# the runtime without torch on other processors, emulated by QEMU; needs qemu-user, apt-get and the network
test-portable: $(STAMP)
	$(BIN)/python tests/portable/emulate.py

lint: $(STAMP) lint-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports silent --allow-untyped-calls --no-warn-return-any benchmarks/*.py benchmarks/quality/*.py
	PYTHONPATH=.lint $(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/end_to_end.py

# the reference model's weights, from scikit-learn's digits (about half an hour on 2 cores)
train: $(STAMP)
	$(BIN)/python -m ditc.exporter.train_digits --out exporter/digits.safetensors

# the text-to-image model's weights, from Noto's emoji, which npm fetches (half a day on one core; goes on where it was)
train-emoji: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m ditc.exporter.train_emoji --work out/emoji --steps $(STEPS) --decay $(DECAY) \
		$(if $(BEGIN),--begin $(BEGIN)) --out exporter/emoji.safetensors

# torch is pinned in constraints.txt: without the pin pip may pull gigabytes of CUDA packages
$(STAMP): pyproject.toml setup.py core/folders.py constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# checkers see the package as it is installed: core is ditc, the other folders are inside it
.PHONY: lint-tree
lint-tree:
	rm -rf .lint && mkdir -p .lint/ditc
	ln -s $(CURDIR)/core/* .lint/ditc/
	for folder in $$($(PYTHON) -c 'import runpy; print(*runpy.run_path("core/folders.py")["FOLDERS"])'); do \
		ln -s $(CURDIR)/$$folder .lint/ditc/$$folder; done

clean:
	rm -rf $(VENV) .lint build out *.egg-info
