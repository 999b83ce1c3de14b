# Each target does all of its own set-up, as root or with sudo, on Debian 12 or Ubuntu 24.04; again, it takes no time.
PYTHON := .venv/bin/python

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: setup ## boot a VM, list its processes by an unchanged LibVMI script, compare the ways to read
	@$(PYTHON) -m lab.demo

lab: setup ## boot a VM with an agent, enrolled as "lab" for `vmishim ps lab` and others, until Ctrl-C
	@$(PYTHON) -m lab boot --agent lab

test: setup ## check all that a change needs: style, types, unit, local and contract tests, guest tests on the default kernel
	@ci/check

unit: ## tests of pure code: no root, nothing built, a few seconds
	@ci/setup --unit
	@ci/check --tests --hypothesis-profile quick tests/unit

local: ## tests on this machine's kernel, as root, without a VM
	@ci/setup --no-vm
	@ci/check --tests tests/local

guest: setup ## tests in booted VMs of the default kernel
	@ci/check --tests tests/guest

kernels: setup ## the tests that depend on the kernel, on the other kernels of ci/kernels.toml; and LibVMI's own bindings
	@ci/check --tests --kernel others --genuine --long tests/contract tests/local/test_fuzz.py \
		$(addprefix tests/guest/test_, $(addsuffix .py, \
		agent attest readahead walks injection sealed scripts sockets ids volatility drgn scan dump dump_files isolation lab \
		freeze sandbox hooks soaking two_vms))

coverage: ## which lines of vmishim and guest_agent the unit and local tests run
	@ci/setup --no-vm
	@$(PYTHON) -m coverage erase
	@$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report= tests/unit tests/local; \
		tests=$$?; $(PYTHON) -m coverage report --skip-covered && exit $$tests

bench: setup ## measure listings of 100, 300 and 1,000 processes, each way to read
	@$(PYTHON) -m bench

histories: ## 3,000 long histories of reads by chance, new ones each time, against an oracle that only reads
	@ci/setup --unit
	@ci/check --tests --hypothesis-profile long --timeout 7200 tests/unit/test_histories.py

soak: setup ## an hour of listings while all in the guest comes and goes, the agent is killed, the network is cut
	@$(PYTHON) -m trials.soak

lint: ## style, types and documentation only
	@ci/setup --no-vm
	@ci/check --lint

docs: ## the documentation site with the API reference, into site/
	@ci/setup --no-vm
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

release: ## wheel, source and agent of the last commit into dist/, from pinned tools, the same bytes each time
	@ci/setup --release
	@ci/release

setup: ## packages, virtual environment, eBPF objects, lab image
	@ci/setup

clean: ## remove what was made here; the lab image stays in its cache
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site .coverage*
	@$(MAKE) --silent -C bpf clean
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo lab test unit local guest kernels coverage histories bench soak lint docs release setup clean
