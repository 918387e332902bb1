"""`pytest --hypothesis-profile=deep tests/properties` runs ten times as many examples as CI does."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

for folder in ("passes", "models"):  # the hand-written FFNs and traps, the tiny models
    sys.path.append(str(Path(__file__).parents[1] / folder))

ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=100, **ALWAYS)
settings.register_profile("deep", max_examples=1000, **ALWAYS)
settings.load_profile("quick")
