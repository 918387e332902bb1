"""`ltepass serve`: the server of transformers, lowered, and its requests checked."""

from ltepass.old_names import held_by

__getattr__ = held_by(__name__)  # of the module that had this name
