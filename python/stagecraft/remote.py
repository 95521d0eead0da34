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
    with refusals(place, flag):
        client = openai.OpenAI(base_url=url, api_key=os.environ.get("API_KEY") or "none", timeout=PATIENCE)
        try:
            there = [model.id for model in client.models.list()]
        except openai.InternalServerError:
            there = []  # transformers serve, where the hub's cache is empty
        except (AttributeError, TypeError, ValueError):  # an answer, but not one to this question
            raise UserError(f"{flag} {url}: speaks no OpenAI API; does the URL end in /v1?") from None
    if wanted and wanted not in there and not _answers(client, wanted):
        raise UserError(f'{flag} {url}: serves no model "{wanted}" (there: {", ".join(there) or "none"})')
    if not wanted and len(there) != 1:
        raise UserError(
            f"{flag} {url}: lists {len(there)} models ({', '.join(there) or 'none'}); say which: {url}#MODEL"
        )
    return client, wanted or there[0]


def _answers(client: openai.OpenAI, model: str) -> bool:
    """Whether it gives a token; `transformers serve FOLDER` lists what is in the hub's cache, not the folder."""
    import openai

    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "."}], max_tokens=1)
    except openai.OpenAIError:
        return False
    return True


@contextmanager
def refusals(place: str, flag: str) -> Iterator[None]:
    """What a server refuses, or breaks off, as a UserError."""
    import httpx
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
            f"{flag} {url}: not found there ({_line(error.message)}); does the URL end in /v1?"
        ) from None
    except openai.APIStatusError as error:
        raise UserError(f"{flag} {url}: refused ({error.status_code}): {_line(error.message)}") from None
    except httpx.InvalidURL as error:
        raise UserError(f"{flag} {url}: no address ({error})") from None
    except (openai.APIError, httpx.HTTPError) as error:  # in the middle of an answer
        raise UserError(
            f"{flag} {url}: the answer broke off ({_line(str(error)) or type(error).__name__})"
        ) from None


def _line(message: str) -> str:
    """A server's words, which may be a page of HTML, as one line."""
    return " ".join(message.split())[:300]
