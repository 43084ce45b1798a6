# make demo, make test: all the set-up is done here, in .venv, with the MLX backend of this machine.
PYTHON ?= python3
BIN := .venv/bin
BACKEND := $(if $(filter Darwin,$(shell uname -s)),,cpu)
comma := ,
# $(call extras,a b) -> [a,b] with the backend's extra in front where this machine needs one
empty :=
space := $(empty) $(empty)
extras = $(if $(strip $(BACKEND) $(1)),[$(subst $(space),$(comma),$(strip $(BACKEND) $(1)))])

.PHONY: demo test test-all test-lowest parity clients lint lock clean

demo: .venv/ready
	$(BIN)/mlx_qwen35.generate --model nano --prompt "What is 34 + 58?"
	$(BIN)/mlx_qwen35.generate --model nano --image examples/pictures/shapes.png --prompt "What do you see?"
	$(BIN)/mlx_qwen35.generate --model nano --video examples/pictures/moving.mp4 --prompt "Which way does the circle move?"
	$(BIN)/python examples/serve.py

test: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full"

test-all: .venv/ready-parity node
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) test-lowest

# Loading, text, pictures, clips, conversion and the hub with the lowest versions that pyproject.toml allows.
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m "not full" tests/test_nano.py tests/checkpoint/test_hub.py \
		tests/checkpoint/test_hub_headers.py tests/prompt tests/engine/test_seeing.py \
		tests/media/test_video_inputs.py tests/convert/test_command.py

parity: .venv/ready-parity
	$(BIN)/python -m pytest tests/parity

# The server as SDKs see it, Python's and JavaScript's, whole.
clients: .venv/ready-parity node
	$(BIN)/python -m pytest tests/server/test_sdks.py

# Without npm, or what it would fetch, the tests in JavaScript are skipped.
.PHONY: node
node:
	-command -v npm >/dev/null && npm install --silent --fetch-retries 0 --fetch-timeout 20000 --prefix tests/server/node

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# The newest versions that fit, with hashes and without addresses, for Macs and Linux. Needs uv.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra cpu --extra server --generate-hashes --upgrade \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements.lock

.venv/bin/python:
	@$(PYTHON) mlx_qwen35/gate.py || { echo "Then try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(call extras,server)'
	@touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(call extras,test)'
	@touch $@

.venv/ready-parity: .venv/ready-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(call extras,test parity clients)'
	@touch $@

.venv-lowest/ready: .venv/ready-test
	$(PYTHON) -m venv .venv-lowest
	$(BIN)/python tests/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-lowest/lowest.txt \
		--editable '.$(call extras,test)'
	@touch $@

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache
