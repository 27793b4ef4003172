"""`python -m weitiao` is the command line."""

from .cli import main

main()
