"""The inspector: a web page that shows a running server. Its files are in ``static``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

FILES: Final = Path(__file__).with_name("static")
TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {
    # Nothing but what is served here: no script in the page, and none of another site.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
PREFIX: Final = "/page/"


def is_page(path: str) -> bool:
    """Whether a path leads to the page or one of its files, which hold nothing of the server."""
    return path == "/" or path.startswith(PREFIX)


def page_routes() -> list[Route]:
    """Routes of the page and its files."""
    files = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in TYPES}

    async def answer(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            return PlainTextResponse("there is no such file\n", status_code=404)
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)

    return [Route("/", answer), Route(f"{PREFIX}{{name}}", answer)]
