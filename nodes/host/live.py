"""What a node that works for long and its picture in the browser say to each other, through ComfyUI's server."""

from __future__ import annotations

import sys
from typing import Any

_asked: set[str] = set()  # ids of the nodes that shall come to an end


def show(node_id: str, state: dict[str, Any]) -> None:
    """Hand a node's state to the page that queued the run; `web/training.js` draws it."""
    if server := running_server():
        server.send_sync("wanflow.training", {"node": node_id, **state}, server.client_id)


def finish_asked(node_id: str) -> bool:
    """Whether the button on the node was pressed since this was asked last."""
    asked = node_id in _asked
    _asked.discard(node_id)
    return asked


def running_server() -> Any:
    """None where ComfyUI's parts are used without its server, as in some tests."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def add_routes() -> None:
    """The address that the button posts to. Routes count when they are there before the server starts."""
    if server := running_server():
        from aiohttp import web

        @server.routes.post("/wanflow/finish/{node}")
        async def finish(request: web.Request) -> web.Response:
            _asked.add(request.match_info["node"])
            return web.json_response({})


add_routes()
