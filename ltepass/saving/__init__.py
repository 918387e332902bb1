"""Files of transformed models: what is written, and what is checked before it is believed."""

from ltepass.old_names import held_by

__getattr__ = held_by(__name__)  # of the module that had this name
