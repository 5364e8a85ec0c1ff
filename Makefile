# A furniture catalogue (CSV + photos) -> a CLIP model fine-tuned on it, its vectors, and the proof that it searches better.
# `make help` lists the targets. Set the variables below on the command line or, as NAME=value without quotes, in .env.
# Targets are files; a changed variable rebuilds what depends on it. The scripts are no prerequisites: a changed comment
# must not retrain a night's model. After changing code, use `make -B TARGET`.

-include .env
DATA ?= data#                            folder of everything that is made
CATALOGUE ?= $(DATA)/sample/catalogue.csv#  CSV with id,name,image_path; the default is drawn by tests/sample.py
COLUMNS ?=#                              which of its columns are ours: id=SKU,name=Title,image_path=Image Src
IMAGES ?= $(patsubst %/,%,$(dir $(firstword $(CATALOGUE))))#  folder that image_path is relative to
QUERIES ?= $(filter $(DATA)/sample/%,$(dir $(CATALOGUE))queries.csv)#  CSV of what shoppers type: query,id
SHARDS ?= $(DATA)/shards#                folder or s3://bucket/prefix
SCENARIO ?= dual_lora#                   linear_probe, dual_lora, vision_lora, text_lora (zero_shot only evaluates)
SAMPLE_COUNT ?= 1200#                    products in the drawn sample catalogue
SEED ?= 42#                              of sample, split and training
EPOCHS ?= auto#                          passes over the train split
MAX_COST ?=#                             US dollars that stage 1 may spend; empty: no limit
POLL_INTERVAL ?= 600#                    seconds between two looks at a running batch
HOST ?= 127.0.0.1#                       where the arena listens
PORT ?= 8000
FOLDS ?= 5#                              parts of the catalogue that `make proof` tests on, one after another
STAGE ?=#                                `make bench STAGE=3` measures one stage only
CLEAN_FLAGS ?=#                          further flags of the five scripts
PREPARE_FLAGS ?=
TRAIN_FLAGS ?=
EMBED_FLAGS ?=
ARENA_FLAGS ?=

.DELETE_ON_ERROR:
.SUFFIXES:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
strip_all = $(foreach name,$(1),$(eval override $(name) := $(strip $($(name)))))
$(call strip_all,DATA CATALOGUE IMAGES QUERIES SHARDS SCENARIO SAMPLE_COUNT SEED EPOCHS MAX_COST POLL_INTERVAL HOST PORT STAGE FOLDS)
export OPENAI_API_KEY OPENAI_BASE_URL

# With a key (or a server of one's own) and a catalogue: the real job. Else the small CLIP and the stand-in for the API;
# a key that happens to be set pays for no drawn products.
SAMPLE := $(DATA)/sample/catalogue.csv
SMALL := local-dir:tests/small_clip
API := $(and $(strip $(OPENAI_API_KEY)$(OPENAI_BASE_URL)),$(filter-out $(SAMPLE),$(CATALOGUE)))
STANDIN = $(if $(API),,$(PYTHON) tests/openai_standin.py --state $(DATA)/standin -- )
# What the stand-in says of a catalogue of one's own must not pass for answers of the real API later.
WORKSPACE := $(DATA)/$(if $(or $(API),$(filter $(SAMPLE),$(CATALOGUE))),batch,rehearsal)
refuse_rehearsal = $(if $(filter %/rehearsal,$(WORKSPACE)),if [ -e $(DATA)/batch/state.json ]; then \
  echo 'make: DATA=$(DATA) holds answers of the API; set OPENAI_API_KEY or rehearse with another DATA' >&2; exit 1; fi,true)
MODEL ?= $(if $(API),ViT-B-32,$(SMALL))
PRETRAINED ?=#                           tag or weights file; empty: the usual weights of MODEL
judged = --model $(MODEL) $(if $(strip $(PRETRAINED)),--pretrained $(PRETRAINED))

VENV := .venv/.installed
PYTHON ?= .venv/bin/python
CLEANED := $(DATA)/cleaned.csv
MANIFEST := $(if $(filter s3://%,$(SHARDS)),$(DATA)/shards.uploaded,$(SHARDS)/manifest.json)
RUNS := $(DATA)/runs
MASTER := $(DATA)/embeddings/master.parquet
SCENARIOS := zero_shot linear_probe vision_lora text_lora dual_lora
$(if $(filter $(filter-out zero_shot,$(SCENARIOS)),$(SCENARIO)),,\
  $(error SCENARIO=$(SCENARIO): choose one that trains: $(filter-out zero_shot,$(SCENARIOS))))

# A settings file is rewritten only when its text changes, so that a changed variable is a changed prerequisite. `make -n`
# writes none: what it would rebuild must not be rebuilt because somebody looked.
SETTINGS := $(DATA)/.settings
LOOKING := $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS))))
quoted = '$(subst ','\'',$(1))'
changed = $(shell printf '%s\n' $(call quoted,$(2)) | cmp -s - $(SETTINGS)/$(1) || echo changed)
write_settings = $(shell mkdir -p $(SETTINGS); printf '%s\n' $(call quoted,$(2)) > $(SETTINGS)/$(1))
settings = $(if $(call changed,$(1),$(2)),$(if $(LOOKING),$(eval .PHONY: $(SETTINGS)/$(1)),$(call write_settings,$(1),$(2))))
# Photos are too many to be prerequisites; one line stands for names, sizes and times of them all.
made = $(addprefix $(DATA)/,shards sample standin runs report embeddings folds proof sweep) .venv
photos = $(if $(filter $(SAMPLE),$(CATALOGUE)),drawn,$(shell find -L $(abspath $(IMAGES)) $(foreach own,$(abspath $(made)),-path '$(own)' -prune -o) -type f \
  -printf '%P %s %T@\n' 2>/dev/null | grep -iE '\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]) ' | LC_ALL=C sort | sha256sum | cut -c1-64))
GOALS := $(or $(MAKECMDGOALS),help)
ifneq ($(filter all clean-data poll prepare train embed arena ablation report proof pictures sweep $(DATA)/%,$(GOALS)),)
  $(call settings,sample,$(SAMPLE_COUNT) $(SEED))
  $(call settings,clean,$(CATALOGUE) $(IMAGES) $(photos) $(OPENAI_BASE_URL) $(CLEAN_FLAGS) $(WORKSPACE) $(if $(findstring =,$(COLUMNS)),$(COLUMNS)))
  $(call settings,prepare,$(IMAGES) $(SHARDS) $(MODEL) $(SEED) $(PREPARE_FLAGS))
  $(call settings,train,$(MODEL) $(PRETRAINED) $(EPOCHS) $(SEED) $(TRAIN_FLAGS))
  $(call settings,embed,$(SCENARIO) $(QUERIES) $(EMBED_FLAGS))
endif

.PHONY: help all clean-data poll prepare train embed arena ablation report proof sweep bench bench-gpu pictures growth memory fuzz verify test lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14
	@echo 'now: CATALOGUE=$(CATALOGUE) MODEL=$(MODEL) SCENARIO=$(SCENARIO) SHARDS=$(SHARDS)'

all: $(MASTER) ## the whole road: clean, prepare, train, embed, and the table of zero-shot against fine-tuned
clean-data: $(CLEANED) ## stage 1: titles and attributes over the OpenAI Batch API
prepare: $(MANIFEST) ## stage 2: split and WebDataset shards
train: $(RUNS)/$(SCENARIO)/train.json ## stage 3: fine-tune (SCENARIO, EPOCHS, MODEL, PRETRAINED)
embed: $(MASTER) ## stage 4: vectors of every item and the retrieval report

$(VENV): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed' >&2; exit 1; }
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(SAMPLE): $(SETTINGS)/sample | $(VENV)
	@echo 'No CATALOGUE is set: drawing a sample catalogue of $(SAMPLE_COUNT) products.'
	$(PYTHON) tests/sample.py --output $(dir $@) --count $(SAMPLE_COUNT) --seed $(SEED)
	@touch -c $@
$(DATA)/sample/queries.csv: | $(SAMPLE)
	@test -e $@ || $(PYTHON) tests/sample.py --output $(@D) --count $(SAMPLE_COUNT) --seed $(SEED) --queries

asked = $(if $(QUERIES),--queries $(QUERIES))
# Shells call the width of a terminal COLUMNS: without "=" it is not ours.
columns = $(if $(findstring =,$(COLUMNS)),--columns $(call quoted,$(COLUMNS)))
clean_flags = --input $(CATALOGUE) --images $(IMAGES) --workspace $(WORKSPACE) --output $(CLEANED) $(columns) \
  --poll-interval $(if $(API),$(POLL_INTERVAL),0) $(if $(MAX_COST),--max-cost $(MAX_COST)) $(CLEAN_FLAGS)
# That the model cannot be trained so is told before stage 1 spends anything.
TRAINABLE := $(and $(API),$(filter all train embed arena ablation report proof sweep,$(GOALS)),$(SETTINGS)/trainable-$(SCENARIO))
$(SETTINGS)/trainable-$(SCENARIO): $(SETTINGS)/train | $(VENV)
	$(PYTHON) 3_train.py --check --scenario $(SCENARIO) $(judged)
	@touch $@
$(CLEANED): $(CATALOGUE) $(SETTINGS)/clean | $(VENV) $(TRAINABLE)
	@$(refuse_rehearsal)
	@$(if $(API),true,echo 'No OPENAI_API_KEY and CATALOGUE of your own: a local stand-in answers from title keywords and colours, at no cost.')
	$(STANDIN)$(PYTHON) 1_clean.py run $(clean_flags)
	@touch -c $@

poll: $(CATALOGUE) | $(VENV) ## stage 1, one step for cron: collect, send what fits, finalize when all is in
	@$(refuse_rehearsal)
	@made() { stat -c %y $(CLEANED) 2>&1 || true; }; before=$$(made); $(STANDIN)$(PYTHON) 1_clean.py poll $(clean_flags) || \
	  { test $$? = 75 || { [ "$$before" = "$$(made)" ] || rm -f $(CLEANED); false; }; }

prepare_flags = --input $(CLEANED) --images $(IMAGES) --model $(MODEL) --seed $(SEED) $(PREPARE_FLAGS)
$(MANIFEST): $(CLEANED) $(SETTINGS)/prepare | $(VENV)
	$(PYTHON) 2_prepare.py --output $(SHARDS) $(prepare_flags)
	@touch $(if $(filter %.uploaded,$@),,-c) $@

# $(call train,shards,scenario). Whether a checkpoint is gone on with, stage 3 knows: file times do not.
define train
	@$(if $(filter $(SMALL),$(MODEL)),echo 'MODEL is the small CLIP that comes with the project: good for a first look; not for a shop.',true)
	$(PYTHON) 3_train.py --shards $(1) --scenario $(2) $(judged) --output $(@D) --epochs $(EPOCHS) --seed $(SEED) \
	  --restart $(TRAIN_FLAGS)
	@touch -c $@
endef
$(RUNS)/%/train.json: $(MANIFEST) $(SETTINGS)/train | $(VENV)
	$(call train,$(SHARDS),$*)

$(MASTER): $(RUNS)/$(SCENARIO)/train.json $(MANIFEST) $(QUERIES) $(SETTINGS)/embed | $(VENV)
	$(PYTHON) 4_embed.py --shards $(SHARDS) $(judged) --finetuned $(RUNS)/$(SCENARIO)/model $(asked) --output $@ $(EMBED_FLAGS)
	@touch -c $@
	@echo 'Vote in the browser, blind, on which model searches better: make arena'

arena: $(MASTER) ## stage 5: blind A/B voting at http://HOST:PORT
	$(PYTHON) 5_arena.py serve --embeddings $(MASTER) --images $(IMAGES) --database $(DATA)/arena.sqlite \
	  --host $(HOST) --port $(PORT) $(ARENA_FLAGS)

ablation: $(SCENARIOS:%=$(RUNS)/%/train.json) ## train all five scenarios, then compare them
	@$(MAKE) --no-print-directory report

finished = $(foreach name,$(SCENARIOS),$(if $(wildcard $(RUNS)/$(name)/train.json),--run $(RUNS)/$(name)))
report: $(QUERIES) | $(VENV) ## compare every finished run on the test split
	$(PYTHON) 4_embed.py report --shards $(SHARDS) $(judged) $(finished) $(asked) --output $(DATA)/report

# Each fold is a catalogue of its own: tested on one part, trained on the others. Static patterns, so that make keeps all.
FOLD := $(DATA)/folds/$(FOLDS)
PARTS := $(shell seq 0 $$(($(FOLDS) - 1)))
$(PARTS:%=$(FOLD)/%/shards/manifest.json): $(FOLD)/%/shards/manifest.json: $(CLEANED) $(SETTINGS)/prepare | $(VENV)
	$(PYTHON) 2_prepare.py --output $(@D) --fold $*/$(FOLDS) $(prepare_flags)
	@touch -c $@
$(PARTS:%=$(FOLD)/%/$(SCENARIO)/train.json): $(FOLD)/%/$(SCENARIO)/train.json: $(FOLD)/%/shards/manifest.json $(SETTINGS)/train | $(VENV)
	$(call train,$(FOLD)/$*/shards,$(SCENARIO))
REPORTS := $(PARTS:%=$(FOLD)/%/report-$(SCENARIO)/report.json)
$(REPORTS): $(FOLD)/%/report-$(SCENARIO)/report.json: $(FOLD)/%/$(SCENARIO)/train.json | $(VENV)
	$(PYTHON) 4_embed.py report --shards $(FOLD)/$*/shards $(judged) --run $(FOLD)/$*/$(SCENARIO) --output $(@D)
	@touch -c $@

proof: $(REPORTS) ## test SCENARIO on every product, FOLDS trainings long: for catalogues whose test split is too small
	$(PYTHON) 4_embed.py pool $(REPORTS:%/report.json=--report %) --output $(DATA)/proof
sweep: $(MANIFEST) | $(VENV) ## learning rates and batches for SCENARIO, tried on the validation split against what auto chooses
	$(PYTHON) tests/sweep.py --shards $(SHARDS) $(judged) --scenario $(SCENARIO) --output $(DATA)/sweep --epochs $(EPOCHS) $(TRAIN_FLAGS)
bench: | $(VENV) ## speed against the plain way, side by side (STAGE=3 for one stage); appends to bench.jsonl
	$(PYTHON) tests/bench.py $(if $(STAGE),--stage $(STAGE))
bench-gpu: | $(VENV) ## stages 3 and 4 on a GPU, checked and then timed; appends to bench_gpu.jsonl
	$(PYTHON) tests/bench_gpu.py
pictures: $(MASTER) ## the README's pictures, made again from the sample catalogue (needs chromium and chromedriver)
	$(PYTHON) tests/pictures.py --data $(DATA) --output docs
growth: | $(VENV) ## seconds, memory and disk of each stage at ROWS="1000 5000 20000" products; appends to growth.jsonl
	$(PYTHON) tests/growth.py $(if $(ROWS),--rows $(ROWS)) $(if $(SIDE),--side $(SIDE))
memory: | $(VENV) ## parameters and memory of each scenario against full fine-tuning (ViT-B/32); writes memory.md
	$(PYTHON) tests/bench_train.py | tee memory.md
verify: | $(VENV) ## hold the shards against their manifest
	$(PYTHON) 2_prepare.py --verify --output $(SHARDS)
# The longest files first, so that none is left for one core alone.
LONGEST := $(addprefix tests/test_,train.py pipeline.py small_machines.py embed.py arena.py prepare.py clean.py)
test: lint | $(VENV) ## every test, on two cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))
lint: | $(VENV) ## style and mistakes that a reader would find
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
fuzz: | $(VENV) ## at least 10,000 cases of broken input
	FUZZ_EXAMPLES=1500 $(PYTHON) -m pytest tests/test_fuzz.py
clean: ## remove shards, vectors and reports; paid results, trained models and votes stay
	rm -rf $(if $(filter s3://%,$(SHARDS)),,$(SHARDS)) $(DATA)/embeddings $(DATA)/report $(SETTINGS) \
	  $(DATA)/proof $(DATA)/folds/*/*/shards $(DATA)/folds/*/*/report-* $(DATA)/folds/*/*/embeddings
