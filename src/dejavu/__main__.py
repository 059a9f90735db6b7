"""`python -m dejavu` is the command `dejavu`."""

from dejavu.cli.main import main

main()
