"""``python -m cupyep``: the command line where its script is not on the path."""

from cupyep.cli import main

main()
