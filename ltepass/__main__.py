"""`python -m ltepass ...` is `ltepass ...`."""

from ltepass.cli import main

if __name__ == "__main__":
    main()
