"""The hub, before a name is looked up there: without it, its library asks five times a file before it says so."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import cache

SECONDS = 10.0  # that the hub has to answer in


def look_for_hub() -> None:
    """Where it does not answer, its library takes what is in its cache alone, from now on and in this process."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


@cache
def answers(url: str) -> bool:
    """Whether a server does, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # somebody did; the hub's library may know the certificate
    except OSError:
        return False
