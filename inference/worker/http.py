"""HTTP for a front end: it asks, and fetches answers; what it asks becomes rows, which workers answer."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from sqlalchemy import Engine, select
from starlette.concurrency import run_in_threadpool

from errors import UserError
from inference.server.limits import body_of, knows
from inference.server.protocol import Form, Refusal, read
from inference.worker.table import Question, ask, counts, patient

SHOWN = ("id", "session", "sequence", "bot_type", "sub_type", "question", "status", "answer", "error")
LOOK_SECONDS = 0.2  # between looks at a row whose answer a client waits for
RETRY_SECONDS = 2.0  # for a database that does not answer
Kind = Annotated[str, Field(max_length=64)]


class Asked(Form):
    """A question. Without a session it begins one."""

    question: str = Field(min_length=1)
    session: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1, max_length=128)
    bot_type: Kind = ""
    sub_type: Kind = ""


def build_app(engine: Engine, keys: Sequence[bytes], max_queue: int, max_body: int) -> FastAPI:
    """Return the application. Without keys everybody may ask. max_queue: questions that may wait; max_body: bytes of a request."""

    def allowed(request: Request) -> None:
        header = request.headers.get("authorization", "")
        if keys and request.url.path != "/health" and not knows(list(keys), header.encode("latin-1")):
            raise Refusal(401, "the API key is wrong or missing; send the header Authorization: Bearer KEY.")

    async def table(function: Any, *words: Any) -> Any:
        return await run_in_threadpool(patient, lambda: function(engine, *words), engine, RETRY_SECONDS)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(allowed)])

    @app.post("/questions", status_code=201)
    async def add(request: Request) -> dict[str, Any]:
        asked = read(Asked, await body_of(request, max_body))
        if (await table(counts))["pending"] >= max_queue:
            raise Refusal(429, "too many questions wait already; ask again later.", Retry_After="5")
        id = await table(ask, asked.session, asked.question, asked.bot_type, asked.sub_type)
        return (await table(rows, Question.id == id))[0]

    @app.get("/questions/{id}")
    async def show(id: Annotated[int, Path(ge=1, lt=2**63)], wait: Annotated[float, Query(ge=0, le=60)] = 0) -> dict[str, Any]:
        deadline = time.monotonic() + wait
        while True:
            found = await table(rows, Question.id == id)
            if not found:
                raise Refusal(404, f"there is no question {id}.")
            if found[0]["status"] in ("done", "failed") or time.monotonic() >= deadline:
                return found[0]
            await asyncio.sleep(LOOK_SECONDS)

    @app.get("/sessions/{session:path}")
    async def dialogue(session: str) -> list[dict[str, Any]]:
        return await table(rows, Question.session == session)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "questions": await table(counts)}

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(Refusal(400, f"{first['loc'][-1]}: {first['msg']}.").body, 400)

    @app.exception_handler(UserError)
    async def away(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse(Refusal(503, "the database does not answer; ask again later.").body, 503, {"Retry-After": "5"})

    return app


def rows(engine: Engine, condition: Any) -> list[dict[str, Any]]:
    """Return the questions of a condition, in the order of the dialogue, as they are shown."""
    columns = [getattr(Question, name) for name in SHOWN]
    with engine.connect() as database:
        found = database.execute(select(*columns).where(condition).order_by(Question.sequence, Question.id))
        return [dict(row) for row in found.mappings()]
