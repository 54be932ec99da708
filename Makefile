# Two commands for a fresh machine with Python and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# On a machine without a GPU the threads of two libraries would wait for each other by spinning.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow lint weights benchmark clean

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

weights: .venv/.ready
	$(BIN)/keyveil weights fetch mobilestylegan-mapping-graph mobilestylegan-mapping \
		mobilestylegan-synthesis-graph mobilestylegan-synthesis mobilefacenet centerface \
		dlib-landmarks5 dlib-recognition faceres-graph faceres landmarks68 head-pose eyes-open orl

# Real faces in, a comparison table out: trains SDN and both phases of iFADIT for a minute each on ORL faces, then
# compares them, trained and untrained, with blur, pixelate, black box and k-same. Ends with runs/demo/table/report.html.
demo: weights
	$(BIN)/keyveil fit --config configs/method/sdn.yaml --config configs/data/orl.yaml \
		--config configs/trainer/cpu.yaml --config configs/debug/demo-sdn.yaml
	$(BIN)/keyveil fit --config configs/method/ifadit-disentangle.yaml --config configs/data/orl.yaml \
		--config configs/trainer/cpu.yaml --config configs/debug/demo-ifadit-disentangle.yaml
	$(BIN)/keyveil fit --config configs/method/ifadit-transform.yaml --config configs/data/orl.yaml \
		--config configs/trainer/cpu.yaml --config configs/debug/demo-ifadit-transform.yaml
	$(BIN)/keyveil compare configs/compare/demo.yaml --out $(DEMO)/table

test: weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: weights
	$(BIN)/python -m pytest

lint: .venv/.ready
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

benchmark: weights
	$(BIN)/keyveil benchmark --out runs/benchmark

clean:
	rm -rf runs .venv
