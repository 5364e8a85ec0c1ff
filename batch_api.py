"""The openai client for stage 1, with every error sorted by what to do about it.

Nothing is repeated here, neither by this class nor by the openai package: a repeated create could buy work twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from chat import ENDPOINT, QUOTA, scrub
from common import CleaningConfig, Fail


class Later(Exception):
    """Something that time may heal. `seconds` is what the server asked for; `doubtful`: the call may have worked."""

    def __init__(self, why: str, seconds: float | None = None, doubtful: bool = False, unreachable: bool = False):
        super().__init__(why)
        self.seconds, self.doubtful, self.unreachable = seconds, doubtful, unreachable


class Missing(Exception):
    """The server does not know the object (404)."""


class Refused(Fail):
    """The server says that the request is wrong (400 and the like)."""


class Quota(Exception):
    """The account may not spend more."""


class NoBatchAPI(Fail):
    """The server has chat completions alone."""


class BatchAPIClient:
    """Files, batches, models and chat over the openai package. Nothing is repeated here: see Machine.step."""

    def __init__(self, settings: CleaningConfig):
        import logging

        import openai

        for name in ("openai", "httpx", "httpx2"):  # OPENAI_LOG=debug would write keys and images to the log
            logging.getLogger(name).setLevel(logging.WARNING)
        self.openai, self.settings = openai, settings
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key and not os.environ.get("OPENAI_BASE_URL"):
            raise Fail("OPENAI_API_KEY is not set; put it into .env, or OPENAI_BASE_URL for a server of your own")
        if not re.fullmatch(r"[!-~]*", key):
            raise Fail("OPENAI_API_KEY holds spaces or characters that no key has; copy it again")
        os.environ["OPENAI_API_KEY"] = key or "none"
        self.client = openai.OpenAI(max_retries=0, timeout=settings.timeout)
        self.reached = False  # whether the server ever answered

    @property
    def url(self) -> str:
        return re.sub(r"//[^/@]*@", "//", str(self.client.base_url)).rstrip("/")

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Run one call. Raises Fail (a person must act), Quota, Missing or Later."""
        openai = self.openai
        try:
            value = function()
            self.reached = True
            return value
        except openai.AuthenticationError:
            raise Fail(f"{self.url}: the key was refused (401); check OPENAI_API_KEY") from None
        except openai.PermissionDeniedError as error:
            raise Fail(
                f"{self.url}: access denied (403 {scrub(error.code or '')}); check the key's project and rights"
            ) from None
        except openai.NotFoundError as error:
            raise Missing(scrub(error.message)) from None
        except openai.APIStatusError as error:
            self.reached = True
            if error.code in QUOTA:
                raise Quota(error.code) from None
            later = error.status_code in (408, 409, 429) or error.status_code >= 500
            if not later:
                raise Refused(f"{what} was refused ({error.status_code}): {scrub(error.message)}") from None
            doubtful = error.status_code == 408 or error.status_code >= 500
            raise Later(f"{what}: status {error.status_code}", retry_after(error.response.headers), doubtful) from None
        except openai.APIConnectionError as error:
            cause = type(error).__name__ if error.__cause__ is None else str(error.__cause__)
            raise Later(f"{self.url}: {scrub(cause)}", None, True, True) from None
        except (ValueError, AttributeError):  # a page in HTML, or JSON of something else
            why = f"{self.url}: {what} brought an answer that is not the API's"
            raise Later(why, None, True, unreachable=not self.reached) from None
        except Exception as error:
            if not type(error).__module__.startswith("http"):  # a download that broke off comes from the layer below
                raise
            raise Later(f"{what}: {scrub(error)}") from None

    def model(self) -> dict[str, Any]:
        """The model's description; Missing where there is none."""
        name = self.settings.model
        try:
            return self.call("models", lambda: self.client.models.retrieve(name).model_dump())
        except Missing:  # some servers only have the list
            with contextlib.suppress(Missing):
                listed = [model.id for model in self.call("models", lambda: self.client.models.list()).data]
                if name in listed:
                    return {"id": name}
                raise Fail(f"{self.url} has no model {name!r} for this key; it has {', '.join(listed[:12])}") from None
            raise Fail(f"{self.url} has no model {name!r} for this key; set --model") from None

    def upload(self, path: Path) -> str:
        def send() -> Any:
            with open(path, "rb") as handle:  # streamed, not read whole
                return self.client.files.create(file=(path.name, handle, "application/jsonl"), purpose="batch").id

        try:
            return self.call(f"upload of {path.name}", send)
        except Missing:
            raise self.no_batches("files") from None

    def no_batches(self, what: str) -> NoBatchAPI:
        return NoBatchAPI(f"{self.url}/{what} is not there (404); where the server has no Batch API, use `run --sync`")

    def create(self, file_id: str, metadata: dict[str, str]) -> Any:
        def send() -> Any:
            return whole(
                self.client.batches.create(
                    input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", metadata=metadata
                )
            )

        return self.call("creating a batch", send)

    def retrieve(self, batch: str) -> Any:
        return self.call(f"batch {batch}", lambda: whole(self.client.batches.retrieve(batch)))

    def cancel(self, batch: str) -> Any:
        return self.call(f"cancelling {batch}", lambda: self.client.batches.cancel(batch))

    def batches(self, since: float) -> list[Any]:
        """Every batch of the account made after `since`, newest first."""

        def read() -> list[Any]:
            newer = itertools.takewhile(lambda batch: batch.created_at >= since, self.client.batches.list(limit=100))
            return list(newer)

        try:
            return self.call("the list of batches", read)
        except Missing:
            raise self.no_batches("batches") from None

    def download(self, file_id: str, path: Path) -> None:
        def read() -> None:
            with (
                common.whole_file(path) as temporary,
                self.client.files.with_streaming_response.content(file_id) as body,
            ):
                body.stream_to_file(temporary)

        self.call(f"file {file_id}", read)

    def chat(self, body: dict) -> dict:
        """One chat completion (for --sync), as the server sent it."""
        create = self.client.chat.completions.with_raw_response.create
        try:
            return self.call("a request", lambda: json.loads(create(**body).text))
        except Missing as error:
            raise Fail(
                f"{self.url}{ENDPOINT.removeprefix('/v1')}: {error}; check OPENAI_BASE_URL and --model"
            ) from None


def whole(batch: Any) -> Any:
    """The batch, if it is one; AttributeError where the server sent something else (the client does not check)."""
    batch.id, batch.status, batch.created_at, batch.request_counts, batch.metadata  # noqa: B018
    return batch


def retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which may also be a date; a day at most."""
    import email.utils

    text = headers.get("retry-after") or ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(0.0, seconds), 86400.0) if math.isfinite(seconds) else None
