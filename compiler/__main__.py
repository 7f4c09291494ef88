"""`python -m ditc.compiler` is the `ditc` command."""

from ditc.compiler.cli import main

main()
