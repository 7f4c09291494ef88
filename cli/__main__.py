"""`python -m ditc.cli` is the `ditc` command."""

from ditc.cli.main import main

main()
