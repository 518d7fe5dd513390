PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := $(if $(ESCAIP_DATA),$(ESCAIP_DATA),data)
DEMO := runs/demo

.PHONY: demo test test-slurm lint clean

# Data, a training by the fairchem command, its figures, a relaxation from ASE.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	test -d $(DATA)/oc20/sample || $(BIN)/escaip sample-data oc20
	$(BIN)/fairchem -c configs/oc20/escaip_2m.yml cluster=cpu backbone=tiny dataset=sample \
	  epochs=6 max_atoms=160 lr=1e-3 loss.energy=20 optim.lr_min_factor=0.01 optim.warmup_epochs=0.5 \
	  job.timestamp_id=$(notdir $(DEMO))
	$(BIN)/escaip plot $(DEMO)
	$(BIN)/python examples/relax_slab.py $(DEMO)/checkpoints/final/inference_ckpt.pt

# FULL=1: also long tests that are much like others.
test: $(VENV)/installed-test
	ESCAIP_TEST_FULL=$(FULL) $(BIN)/python -m pytest -n 2 --dist loadfile

# Jobs on a SLURM that the tests start and stop; FULL=1: all 20 interruptions at random moments;
# SELECT=test_run.py: one file.
test-slurm: $(VENV)/installed-test
	ESCAIP_TEST_FULL=$(FULL) $(BIN)/python -m pytest tests/slurm/$(SELECT) --durations=10

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist

# Installed again only when the dependencies may have changed. What is imported is compiled then:
# compiling all of it first takes over a minute.
define install
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e "$(1)"
	touch $@
endef

$(VENV)/installed: pyproject.toml
	$(call install,.)

$(VENV)/installed-test: pyproject.toml
	$(call install,.[test])
