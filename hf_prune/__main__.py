"""`python -m hf_prune` is the command `hf-prune`."""

from .cli import main

main()
