"""The command line: `ltepass ...`."""

from ltepass.cli.typer_app import app as app
from ltepass.cli.typer_app import main as main
