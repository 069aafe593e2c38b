"""The paths of the server: chat completions, completions, models, scores, health, metrics. Each is a function of the request;
Starlette's requests and responses without its router and middleware, which took a fifth of the event loop's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inference.scores import Scoring
from inference.server.exchange import Exchange, finished
from inference.server.limits import Gate, body_of
from inference.server.prompts import chat_prompt, score_tokens, text_prompt
from inference.server.protocol import ChatQuestion, Refusal, ScoreQuestion, TextQuestion, read, usage
from inference.server.service import Service

SWITCH = {"true": True, "1": True, "false": False, "0": False}


def build_app(service: Service, keys: Sequence[bytes] = ()) -> Gate:
    """Return the ASGI application. Without keys everybody may ask."""
    paths = {
        "/v1/chat/completions": ("POST", chat), "/v1/completions": ("POST", complete), "/v1/models": ("GET", models),
        "/v1/score": ("POST", score), "/health": ("GET", health), "/metrics": ("GET", metrics),
    }  # fmt: skip
    return Gate(service, list(keys), paths, ("/v1/models/", "GET", model))


async def chat(service: Service, request: Request) -> Any:
    """Answer a dialogue."""
    body = await body_of(request, service.limits.max_body)
    question = read(ChatQuestion, body)
    adapter = service.adapter(question)
    tools = question.tools if question.tool_choice == "auto" else []
    wanted = question.longest or service.limits.max_new_tokens
    prompt, left_out = await service.encode(len(body), chat_prompt, question.messages, tools, wanted)
    if left_out:
        request.scope["notes"]["left_out"] = left_out
    names = [tool.function.name for tool in tools]
    return await Exchange(service, request, question, adapter, [prompt], names).response()


async def complete(service: Service, request: Request) -> Any:
    """Continue texts, or tokens."""
    body = await body_of(request, service.limits.max_body)
    question = read(TextQuestion, body)
    adapter = service.adapter(question)
    rows = service.served.model.get_input_embeddings().weight.shape[0]
    prompts = [await service.encode(len(body), text_prompt, prompt, rows) for prompt in question.prompts]
    return await Exchange(service, request, question, adapter, prompts).response()


async def score(service: Service, request: Request) -> Response:
    """Score dialogues with a reward model. ?normalised=true: in units of the spread that step 2 measured, from its mean."""
    body, served = await body_of(request, service.limits.max_body), service.served
    question = read(ScoreQuestion, body)
    service.known(question.model)
    if not served.scores:
        raise Refusal(400, f"{served.name} is no reward model; start a server with --path and a reward model.", param="model")
    normalised = SWITCH.get(request.query_params.get("normalised", "false").lower())
    if normalised is None:
        raise Refusal(400, "normalised: write true or false.", param="normalised")
    ended = question.ended or [True] * len(question.answers)
    samples = zip(question.prompts, question.answers, ended, strict=True)
    rows = [await service.encode(len(body), score_tokens, *sample) for sample in samples]
    scoring = Scoring(rows, normalised)
    service.submit([scoring])
    [scores] = await finished(service, request, [scoring])
    tokens = sum(map(len, rows))
    request.scope["notes"].update(model=served.name, rows=len(rows), prompt=tokens)
    service.metrics.prompt_tokens.inc(tokens)
    return JSONResponse({"object": "list", "model": served.name, "scores": scores, "usage": usage(tokens, 0)})


async def models(service: Service, request: Request) -> Response:
    """List the models."""
    return JSONResponse({"object": "list", "data": [card(service, name) for name in service.served.names]})


async def model(service: Service, request: Request) -> Response:
    """Show one model."""
    name = request.scope["path"].removeprefix("/v1/models/")
    service.known(name)
    return JSONResponse(card(service, name))


async def health(service: Service, request: Request) -> Response:
    """Say whether the server takes requests."""
    state = "stopping" if service.ending else "ok" if service.worker.alive else "failed"
    return JSONResponse({"status": state, "model": service.served.name}, 200 if state == "ok" else 503)


async def metrics(service: Service, request: Request) -> Response:
    """Show the metrics in Prometheus' form."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def card(service: Service, name: str) -> dict[str, Any]:
    """Return what /v1/models says of a model. parent: the model under an adapter."""
    parent = service.served.name if name in service.served.adapters else None
    kind = "reward" if service.served.scores else "chat"
    return {
        "id": name, "object": "model", "created": service.begun, "owned_by": "sanbu", "parent": parent, "kind": kind,
        "max_model_len": service.served.longest,
    }  # fmt: skip
