# The steps of CI, one by one; `make ci` is all of them in environments of their own.

.PHONY: test smoke lint docs ci

test:
	pytest

smoke:
	pytest -m smoke -n 0

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	sphinx-build -W --keep-going -q docs docs/_build/html

ci:
	.ci/run
