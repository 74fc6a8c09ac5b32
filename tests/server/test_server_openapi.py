"""The description of the API, held to the routes."""

from __future__ import annotations

from starlette.routing import Route

from nitsum.server.app import ROUTES
from nitsum.server.openapi import OPERATIONS
from tests.server.server_kit import Bench


def test_every_operation_is_a_route(bench: Bench):
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for route in ROUTES
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    described = {(one.method, one.path) for one in OPERATIONS}
    assert described <= routes


def test_it_is_complete_in_itself(bench: Bench):
    document = bench.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    assert {"ChatBody", "ChatCompletion", "Error"} <= set(schemas)
    names = set(_refs(document))
    assert names
    assert names <= {f"#/components/schemas/{name}" for name in schemas}


def _refs(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for inner in value.values() for ref in _refs(inner)]
    if isinstance(value, list):
        return [ref for inner in value for ref in _refs(inner)]
    return []


def test_errors_have_the_shape_described(bench: Bench):
    document = bench.get("/openapi.json").json()
    described = document["components"]["schemas"]["ErrorDetail"]["properties"]
    assert set(bench.post("/v1/chat/completions", {}).json()["error"]) == set(described)
