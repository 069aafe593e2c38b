"""The paths of the server, on FastAPI: chat completions, completions, models, scores, health, metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from inference.scores import Scoring
from inference.server.exchange import Exchange, finished
from inference.server.limits import Gate, body_of
from inference.server.prompts import chat_prompt, score_tokens, text_prompt
from inference.server.protocol import ChatQuestion, Refusal, ScoreQuestion, TextQuestion, read, usage
from inference.server.service import Service

logger = logging.getLogger("sanbu")

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/score", "/health", "/metrics")


def build_app(service: Service, keys: Sequence[bytes] = ()) -> Gate:
    """Return the ASGI application. Without keys everybody may ask."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    limits, served = service.limits, service.served

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await body_of(request, limits.max_body)
        question = read(ChatQuestion, body)
        adapter = service.adapter(question)
        tools = question.tools if question.tool_choice == "auto" else []
        wanted = question.longest or limits.max_new_tokens
        prompt, left_out = await service.encode(len(body), chat_prompt, question.messages, tools, wanted)
        if left_out:
            request.scope["notes"]["left_out"] = left_out
        names = [tool.function.name for tool in tools]
        return await Exchange(service, request, question, adapter, [prompt], names).response()

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await body_of(request, limits.max_body)
        question = read(TextQuestion, body)
        adapter = service.adapter(question)
        rows = served.model.get_input_embeddings().weight.shape[0]
        prompts = [await service.encode(len(body), text_prompt, prompt, rows) for prompt in question.prompts]
        return await Exchange(service, request, question, adapter, prompts).response()

    @app.post("/v1/score")
    async def score(request: Request, normalised: bool = False) -> dict[str, Any]:
        body = await body_of(request, limits.max_body)
        question = read(ScoreQuestion, body)
        service.known(question.model)
        if not served.scores:
            raise Refusal(400, f"{served.name} is no reward model; start a server with --path and a reward model.", param="model")
        ended = question.ended or [True] * len(question.answers)
        samples = zip(question.prompts, question.answers, ended, strict=True)
        rows = [await service.encode(len(body), score_tokens, *sample) for sample in samples]
        scoring = Scoring(rows, normalised)
        service.submit([scoring])
        [scores] = await finished(request, [scoring], limits.timeout)
        tokens = sum(map(len, rows))
        request.scope["notes"].update(model=served.name, rows=len(rows), prompt=tokens)
        service.metrics.prompt_tokens.inc(tokens)
        return {"object": "list", "model": served.name, "scores": scores, "usage": usage(tokens, 0)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(service, name) for name in served.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.known(name)
        return card(service, name)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "stopping" if service.ending else "ok" if service.worker.alive else "failed"
        return JSONResponse({"status": state, "model": served.name}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)
    return Gate(app, service, list(keys), PATHS)


def card(service: Service, name: str) -> dict[str, Any]:
    """Return what /v1/models says of a model. parent: the model under an adapter."""
    parent = service.served.name if name in service.served.adapters else None
    kind = "reward" if service.served.scores else "chat"
    return {
        "id": name, "object": "model", "created": service.begun, "owned_by": "sanbu", "parent": parent, "kind": kind,
        "max_model_len": service.served.longest,
    }  # fmt: skip


async def refused(request: Request, refusal: Exception) -> JSONResponse:
    """Answer a request that gets no answer, in OpenAI's form."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def unknown(request: Request, error: Exception) -> JSONResponse:
    """Answer a request for a path, or by a method, that does not exist; FastAPI raises it."""
    words = {404: f"there is no such path; there are {', '.join(PATHS)}.", 405: f"this path does not take {request.method}."}
    refusal = Refusal(error.status_code, words.get(error.status_code, str(error.detail)))
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> JSONResponse:
    """Answer a request on which the server failed."""
    return JSONResponse(Refusal(500, "the server failed on this request; its log says why.").body, 500)
