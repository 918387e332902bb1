"""How sparse: thresholds, and cuts within active neurons."""

from ltepass.old_names import held_by

__getattr__ = held_by(__name__)  # of the module that had this name
