# Every target sets up what it needs. PYTHON=python3.12 make env chooses the
# interpreter of the environment. STACK=openmmlab runs a target in OpenMMLab's
# last releases instead of the default stack, in an environment of its own.
STACK ?= onedl
export STACK
VENV = .venv$(if $(filter-out onedl,$(STACK)),-$(STACK))

# The file cpu-only there says that mmcv's ops were built without CUDA on a
# machine with a GPU; dev/setup_env.py writes it.
PY = $(shell test -e $(VENV)/cpu-only && echo CUDA_VISIBLE_DEVICES=) \
     $(VENV)/bin/python

.PHONY: env test demo lint clean

env:
	@$${PYTHON:-python3} dev/setup_env.py

lint: env
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal

demo: env
	test -e data/shapes || $(PY) tools/make_sample_data.py coco data/shapes \
	    --images 800 --size 160
	$(PY) tools/train.py configs/mask_rcnn/overlock_mini_shapes.py \
	    --work-dir work_dirs/demo
	$(PY) tools/summarize.py work_dirs/demo

clean:
	rm -rf $(VENV) build dist *.egg-info data/shapes work_dirs/demo \
	    .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
