"""Answers of the control socket, as an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from guestio.budgets import CONTROL_EVENTS, CONTROL_STREAMS, FAULT_RULE_CHARS
from guestio.control import metrics
from guestio.control.explain import access_text
from guestio.control.page import is_page, page_routes
from guestio.control.rates import Rates
from guestio.control.recall import Recall
from guestio.control.record import groups_of, record_stream
from guestio.control.status import Observed, rules_of
from guestio.control.survey import add_history
from guestio.errors import GuestioError
from guestio.trace import Group, Records, TraceReader, Tracing, What

STREAM_STEP: Final = 0.1
"""Seconds between looks for new events."""

STREAM_QUIET: Final = 50
"""Looks without events after which a line is sent, so that a client that is gone is noticed."""

MAP_NUMBERS: Final = ("address", "length", "parts")
"""What a survey is asked with."""

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")

Handler = Callable[[Request], Awaitable[Response]]
App = Callable[[Any, Any, Any], Awaitable[None]]


def make_app(
    observed: Observed, rates: Rates, recall: Recall, *, token: str | None, local: bool
) -> App:
    """The application.

    Args:
        observed: The server.
        rates: Knows its counts of before.
        recall: Has changes of translations recorded.
        token: What each request must bring, or None.
        local: Whether requests are to name this machine as their host: a browser that was led here
            by another site's name does not.
    """
    streams = [0]

    async def status(_: Request) -> Response:
        return JSONResponse(rates.status())

    async def metric(request: Request) -> Response:
        status = rates.status()
        if metrics.prefers_plain(request.headers.get("accept", "")):
            return Response(metrics.render_plain(status), media_type=metrics.PLAIN_CONTENT_TYPE)
        return Response(metrics.render(status), media_type=metrics.CONTENT_TYPE)

    async def explain(request: Request) -> Response:
        try:
            address = int(request.query_params["address"], 0)
            length = int(request.query_params.get("length", "1"), 0)
            number = request.query_params.get("endpoint")
            endpoint = None if number is None else int(number, 0)
            found = observed.explain(address, length, endpoint=endpoint)
            found["recorded_s"] = recall.ask()
            return JSONResponse(found)
        except KeyError:
            return _refused(400, "say which address: /explain?address=0x1000")
        except (ValueError, GuestioError) as error:
            return _refused(400, str(error))

    async def map_(request: Request) -> Response:
        wanted = request.query_params
        try:
            address, length, parts = (int(wanted[name], 0) for name in MAP_NUMBERS)
            found = observed.survey(address, length, parts, memory=wanted.get("of") == "memory")
        except KeyError as error:
            return _refused(400, f"{error} is missing: /map?address=0&length=0x100000&parts=256")
        except (ValueError, GuestioError) as error:
            return _refused(400, str(error))
        add_history(
            found,
            observed.status()["device"]["origin"],
            recorded_s=recall.ask() if "age" in wanted else None,
            uses_s=recall.ask_uses() if "hits" in wanted else None,
        )
        return JSONResponse(found)

    async def events(request: Request) -> Response:
        try:
            groups, kinds = _chosen(request)
        except ValueError as error:
            return _refused(400, str(error))
        if streams[0] >= CONTROL_STREAMS:
            return _refused(503, f"{CONTROL_STREAMS} streams of events are open already")
        origin = observed.status()["device"]["origin"]
        return StreamingResponse(
            _stream(streams, groups, kinds, origin),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    async def record(request: Request) -> Response:
        if is_foreign(request):
            return _refused(403, "a page of another site asks for this")
        try:
            groups = groups_of(request.query_params.get("payload", "none"))
        except ValueError as error:
            return _refused(400, str(error))
        if streams[0] >= CONTROL_STREAMS:
            return _refused(503, f"{CONTROL_STREAMS} streams of events are open already")
        return StreamingResponse(
            record_stream(streams, observed, groups),
            media_type="application/x-ndjson",
            headers={"Cache-Control": "no-store"},
        )

    async def fault(request: Request) -> Response:
        rules = rules_of(observed)
        if rules is None:
            return _refused(404, "this server obeys no rules: start it with --fault none")
        if is_foreign(request):
            return _refused(403, "a page of another site asks for this")
        try:
            if request.method == "POST":
                rules.on(await _text(request))
            elif request.method == "DELETE":
                rules.off(int(request.query_params.get("number", "0")))
        except ValueError as error:
            return _refused(400, str(error))
        return JSONResponse([each._asdict() for each in rules.counts()])

    def failed(_: Request, error: Exception) -> Response:
        return _refused(500, f"{type(error).__name__} while answering; this is guestio's mistake")

    inner = Starlette(
        routes=[
            Route("/status", status),
            Route("/metrics", metric),
            Route("/explain", explain),
            Route("/map", map_),
            Route("/events", events),
            Route("/record", record, methods=["POST"]),
            Route("/fault", fault, methods=["GET", "POST", "DELETE"]),
            *page_routes(),
        ],
        exception_handlers={Exception: failed},
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # The page is the same everywhere, and asks for the token.
            needed = None if is_page(scope["path"]) else token
            refusal = check_allowed(Request(scope), needed, local=local)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await inner(scope, receive, send)

    return guarded


def _refused(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status_code=status)


def is_foreign(request: Request) -> bool:
    """Whether a page of another site asks: a browser says so where something is changed."""
    page = request.headers.get("origin", "").partition("://")[2]
    return page not in ("", request.headers.get("host"))


async def _text(request: Request) -> str:
    """What a request brings, a line of text.

    Raises:
        ValueError: It is longer than a rule may be, or no text.
    """
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > FAULT_RULE_CHARS:
            raise ValueError(f"a rule has at most {FAULT_RULE_CHARS} characters")
    return found.decode()


def check_allowed(request: Request, token: str | None, *, local: bool) -> Response | None:
    """What a request that may not be answered is answered; None if it may."""
    if local:
        host = request.headers.get("host", "")
        name = host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]
        if name not in LOCAL_NAMES:
            return _refused(403, "this machine is called localhost here")
    if token is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            query = parse_qs(request.url.query).get("token", [""])[0]
            if not hmac.compare_digest(query.encode(), token.encode()):
                return PlainTextResponse(
                    "a token is needed: Authorization: Bearer TOKEN\n",
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
    return None


def _chosen(request: Request) -> tuple[Group, list[int]]:
    """The groups and kinds of events that a stream is to have."""
    groups = Group(0)
    for name in request.query_params.get("groups", "life,translations").split(","):
        try:
            groups |= Group[name.strip().upper()]
        except KeyError:
            known = ", ".join(group.name.lower() for group in Group if group.name)
            raise ValueError(f"{name[:40]!r} is no group of events: {known}") from None
    kinds = []
    for name in filter(None, request.query_params.get("what", "").split(",")):
        try:
            kinds.append(int(What[name.strip().upper()]))
        except KeyError:
            known = ", ".join(what.name.lower() for what in What)
            raise ValueError(f"{name[:40]!r} is no event: {known}") from None
    return groups, kinds


async def _stream(
    streams: list[int], groups: Group, kinds: list[int], origin: int
) -> AsyncIterator[str]:
    """Events as server-sent events; those that are too many are counted as lost."""
    streams[0] += 1
    quiet = 0
    wanted = [
        int(what)
        for what in What
        # Bytes of a guest's are for recordings.
        if what.group & groups and what != What.DATA and (not kinds or what in kinds)
    ]
    try:
        with Tracing(groups), TraceReader() as reader:
            yield ": guestio events\n\n"
            while True:
                records, lost = reader.read()
                records = records[(records["origin"] == origin) | (records["origin"] == 0)]
                chosen = _of_kinds(records, wanted)
                lost += max(len(chosen) - CONTROL_EVENTS, 0)
                chosen = chosen[-CONTROL_EVENTS:]
                parts = [f"data: {json.dumps(event_json(record))}\n\n" for record in chosen]
                if lost:
                    parts.append(f'event: lost\ndata: {{"records": {lost}}}\n\n')
                quiet = 0 if parts else quiet + 1
                if quiet >= STREAM_QUIET:
                    parts.append(": still here\n\n")
                    quiet = 0
                if parts:
                    yield "".join(parts)
                await asyncio.sleep(STREAM_STEP)
    finally:
        streams[0] -= 1


def _of_kinds(records: Records, wanted: list[int]) -> Records:
    import numpy as np

    return records[np.isin(records["what"], wanted)]


def event_json(record: Any) -> dict[str, Any]:
    """A record as ``/events`` sends it: fields that say nothing are left out."""
    from guestio.trace import NO_HEAD, NO_QUEUE

    found: dict[str, Any] = {
        "time_s": int(record["time"]) / 1e9,
        "what": What(int(record["what"])).name.lower(),
        "thread": int(record["thread"]),
    }
    if int(record["queue"]) != NO_QUEUE:
        found["queue"] = int(record["queue"])
    if int(record["head"]) != NO_HEAD:
        found["head"] = int(record["head"])
    for name in ("address", "length", "detail", "result"):
        if int(record[name]):
            found[name] = int(record[name])
    if int(record["since"]):
        found["took_s"] = max(int(record["time"]) - int(record["since"]), 0) / 1e9
    if int(record["access"]):
        found["access"] = access_text(int(record["access"]))
    return found
