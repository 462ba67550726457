"""What only a GPU can show: `python -m tests.gpu`; see its `--help`."""
