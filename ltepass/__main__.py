"""`python -m ltepass ...` is `ltepass ...`."""

from ltepass.cli import main

main()
