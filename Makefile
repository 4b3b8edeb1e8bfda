# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Each target first makes what it needs: Debian packages, .venv, the collection in .build.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help test lint sanity test-unit test-loop test-vm test-vm-apart test-vm-13 test-molecule demo bench soak clean \
	python collection packages-lint packages-rulebook packages-lab packages-filesystems

# Extra arguments for pytest, for example: make test-unit ARGS='-k format'
ARGS ?=
ENVIRONMENT := . tools/environment.sh &&
PYTEST = $(ENVIRONMENT) python -m pytest --junitxml=.build/results/$@.xml

help:
	@echo 'make demo           break a disk in a virtual machine and watch a playbook heal it'
	@echo 'make test           everything below, with a summary'
	@echo '  make lint           style, types, licences, documentation, the artifact'
	@echo '  make sanity         ansible-test sanity'
	@echo '  make test-unit      the core as plain Python'
	@echo '  make test-loop      daemon, event source and rulebook on this machine'
	@echo '  make test-vm        real block devices in a virtual machine'
	@echo '  make test-vm-apart  those of them that have guests of their own'
	@echo '  make test-vm-13     the core ones of these on Debian 13'
	@echo '  make test-molecule  the modules and the role through Ansible in a virtual machine'
	@echo 'make bench          what a remap, a commit and a table load cost'
	@echo 'make soak           the long forms of the tests, and all that need a guest on Debian 13'
	@echo 'make clean          remove what the targets above made here'

python:
	@tools/install_packages python
	@tools/make_venv

collection: python
	@$(ENVIRONMENT) python tools/lay_out_collection.py

packages-lab: packages-filesystems

packages-lint packages-rulebook packages-lab packages-filesystems:
	@tools/install_packages $(subst packages-,,$@)

test: packages-lint packages-rulebook packages-lab collection
	@$(ENVIRONMENT) python tools/run_all.py

lint: packages-lint collection
	@$(ENVIRONMENT) python tools/lint.py

sanity: packages-lint collection
	@$(ENVIRONMENT) python tools/sanity.py

test-unit: packages-filesystems collection
	@$(PYTEST) tests/unit -m 'not soak' $(ARGS)

test-loop: packages-rulebook collection
	@$(PYTEST) tests/loop -m 'not soak' $(ARGS)

test-vm: packages-rulebook packages-lab collection
	@$(PYTEST) tests/vm -v -m 'not soak and not second and not apart' $(ARGS)

test-vm-apart: packages-rulebook packages-lab collection
	@$(PYTEST) tests/vm -v -m 'apart and not soak and not second' $(ARGS)

test-vm-13: packages-rulebook packages-lab collection
	@$(PYTEST) tests/vm -v -m '(core or second) and not soak' --lab-image debian-13 $(ARGS)

test-molecule: packages-lab collection
	@$(ENVIRONMENT) python tools/run_molecule.py

demo: packages-rulebook packages-lab collection
	@$(ENVIRONMENT) python -m demo $(ARGS)

bench: packages-lab collection
	@$(ENVIRONMENT) python -m benchmarks $(ARGS)

soak: packages-rulebook packages-lab collection
	@$(PYTEST) tests -m 'soak or second' $(ARGS)
	@$(PYTEST) tests/vm --lab-image debian-13 $(ARGS)

clean:
	rm -rf .build .venv .ansible .hypothesis .ruff_cache tests/output dm_remap-storage-*.tar.gz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
