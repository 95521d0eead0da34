"""A server that speaks OpenAI's API: which of its models is meant, and what its refusals mean.

A place is written URL or URL#MODEL, e.g. http://127.0.0.1:8000/v1#sft. The key comes from API_KEY, never from a flag,
which everybody on the machine could read in the list of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stagecraft.errors import UserError

if TYPE_CHECKING:
    import openai

PATIENCE = 600.0  # seconds for one answer; a CPU that serves many at once may need minutes


def is_url(place: str) -> bool:
    """Whether a place is a server rather than a folder."""
    return place.startswith(("http://", "https://"))


def connect(place: str, flag: str) -> tuple[openai.OpenAI, str]:
    """(client, model) of a server. Raises UserError where nobody answers, or the model is not served there."""
    import openai

    url, _, wanted = place.partition("#")
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("API_KEY") or "none", timeout=PATIENCE)
    with refusals(place, flag):
        there = [model.id for model in client.models.list()]
    if wanted and wanted not in there:
        raise UserError(f'{flag} {url}: serves no model "{wanted}" (there: {", ".join(there) or "none"})')
    if not wanted and len(there) != 1:
        raise UserError(
            f"{flag} {url}: serves {len(there)} models ({', '.join(there)}); say which: {url}#MODEL"
        )
    return client, wanted or there[0]


@contextmanager
def refusals(place: str, flag: str) -> Iterator[None]:
    """What a server refuses, as a UserError."""
    import openai

    url = place.partition("#")[0]
    try:
        yield
    except openai.APITimeoutError:
        raise UserError(f"{flag} {url}: no answer within {PATIENCE:.0f} s") from None
    except openai.APIConnectionError:
        raise UserError(
            f"{flag} {url}: nobody answers there; start a server (make serve), or mend the address"
        ) from None
    except openai.AuthenticationError:
        raise UserError(f"{flag} {url}: the server wants another key; set API_KEY") from None
    except openai.NotFoundError as error:
        raise UserError(
            f"{flag} {url}: not found there ({error.message}); does the URL end in /v1?"
        ) from None
    except openai.APIStatusError as error:
        raise UserError(f"{flag} {url}: refused ({error.status_code}): {error.message}") from None
