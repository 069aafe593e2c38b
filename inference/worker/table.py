"""The table of questions: asked, claimed by one worker at a time, answered once. SQLite, PostgreSQL, MySQL and MariaDB.

A question is pending, then running while a worker holds it, then done or failed. A running row whose lease has run out may be
claimed again: its worker was killed. Each claim raises ``attempts``, and whoever changes a row names the number it has read:
of two workers that want one row, or of two that answered it, the second changes nothing.
"""

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Engine, String, func, select, update
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from errors import UserError, refuse

logger = logging.getLogger("sanbu")

STATES = ("pending", "running", "done", "failed")
DRIVERS = {
    "sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql",
}  # fmt: skip
# Seconds since 1970 by the clock of the database: those of two workers may differ.
MYSQL_CLOCK = "timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) / 1000000.0"
CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": MYSQL_CLOCK,
    "mariadb": MYSQL_CLOCK,
}
LONG_TEXT = sa.Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")  # MySQL's TEXT ends at 64 KiB
NO_KIND: dict[str, str] = {}
Result = TypeVar("Result")


class Base(DeclarativeBase):
    """The tables."""


class Question(Base):
    """A question of a session and its answer. Whoever asks in SQL needs no more than session and question.

    sequence: the turn in the session; where it is equal, the id decides. lease: when the claim of ``worker`` ends, in seconds
    since 1970. error: why a question failed.
    """

    __tablename__ = "questions"
    __table_args__ = (sa.Index("questions_by_status", "status", "lease"), sa.Index("questions_by_session", "session"))

    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    session: Mapped[str] = mapped_column(String(128))
    sequence: Mapped[int] = mapped_column(server_default="0")
    bot_type: Mapped[str] = mapped_column(String(64), server_default="")
    sub_type: Mapped[str] = mapped_column(String(64), server_default="")
    question: Mapped[str] = mapped_column(LONG_TEXT)
    status: Mapped[str] = mapped_column(String(16), server_default="pending")
    answer: Mapped[str | None] = mapped_column(LONG_TEXT)
    error: Mapped[str | None] = mapped_column(sa.Text)
    attempts: Mapped[int] = mapped_column(server_default="0")
    worker: Mapped[str] = mapped_column(String(128), server_default="")
    lease: Mapped[float] = mapped_column(sa.Double, server_default="0")
    created: Mapped[datetime.datetime] = mapped_column(sa.DateTime, server_default=func.now())
    answered: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime)


@dataclass(frozen=True)
class Claim:
    """A question that a worker holds. history: the last answered turns before it, as messages."""

    id: int
    session: str
    question: str
    attempt: int
    history: list[dict[str, str]]


# --- the database -------------------------------------------------------------------------------------------------------


def connect(address: str) -> Engine:
    """Return the engine of a database by its URL; nothing is asked of it yet. UserError for a URL that cannot be."""
    try:
        url = sa.make_url(address)
    except (ArgumentError, ValueError):  # not repeated: it may hold a password
        raise UserError("--database is no URL; write sqlite:///questions.db or postgresql://user:password@host/name.") from None
    name = DRIVERS.get(url.drivername, url.drivername)
    refuse(name.partition("+")[0] not in CLOCKS, f"--database: {url.drivername} is not known; there are {', '.join(DRIVERS)}.")
    options: dict[str, Any] = {"connect_args": {"connect_timeout": 10}, "isolation_level": "READ COMMITTED"}
    if name.startswith("sqlite"):
        folder = Path(url.database or "").parent
        refuse(not url.database or not folder.is_dir(), f"--database {url}: name a file in a folder that is there.")
        options = {"connect_args": {"timeout": 30}}  # seconds that a writer waits for another one
    try:
        return sa.create_engine(url.set(drivername=name), pool_pre_ping=True, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise UserError(f"--database {url} needs a driver ({error}); pip install -r requirements-serve.txt brings them.") from error


def patient(work: Callable[[], Result], engine: Engine, seconds: float) -> Result:
    """Return what work() returns; try again while the database does not answer. UserError after so many seconds."""
    deadline, pause = time.monotonic() + seconds, 0.1
    while True:
        try:
            return work()
        except DBAPIError as error:
            reason = str(error.orig).strip().split("\n")[0]
            down = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
            if not down or time.monotonic() + pause > deadline:
                advice = f"does not answer within {seconds:g} s; start it, or correct" if down else "refuses; correct it or"
                raise UserError(f"The database {engine.url} {advice} --database ({reason}).") from error
        logger.warning("the database does not answer (%s); trying again", reason)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def create_tables(engine: Engine) -> None:
    """Make the table, if it is not there."""
    Base.metadata.create_all(engine)


def check_table(engine: Engine) -> None:
    """Raise UserError unless the database has the table with all its columns."""
    name, columns = Question.__tablename__, Question.__table__.columns.keys()
    inspector = sa.inspect(engine)
    make = "make it: python -m inference.worker create-tables --database URL"
    refuse(not inspector.has_table(name), f"The database {engine.url} has no table {name}; {make}.")
    missing = set(columns) - {column["name"] for column in inspector.get_columns(name)}
    another = f"is of another schema: no column {', '.join(sorted(missing))}; name another database, or rename that table"
    refuse(missing, f"The table {name} of {engine.url} {another}.")


# --- the life of a question -----------------------------------------------------------------------------------------------


def ask(engine: Engine, session: str, question: str, bot_type: str = "", sub_type: str = "") -> int:
    """Add a question at the end of a session; returns its id."""
    kind = {"session": session, "bot_type": bot_type, "sub_type": sub_type}
    with engine.begin() as database:
        last = database.scalar(select(func.max(Question.sequence)).filter_by(**kind)) or 0
        row = {**kind, "sequence": last + 1, "question": storable(question)}
        return database.execute(sa.insert(Question).values(row)).inserted_primary_key[0]


def storable(text: str) -> str:
    """Return a text without NUL, which PostgreSQL does not store."""
    return text.replace("\0", "")


def claim(
    engine: Engine, worker: str, count: int, lease: float = 60.0, tries: int = 3, turns: int = 3, kind: dict[str, str] = NO_KIND
) -> list[Claim]:
    """Take up to ``count`` questions, oldest first: pending ones, and running ones whose lease has run out.

    A question waits until those before it in its session are answered: they are its history. lease: seconds. tries: claims
    after which a question has failed. kind: bot_type and sub_type to which the worker keeps.
    """
    now = clock(engine)
    lost = sa.and_(Question.status == "running", Question.lease < now)
    before = aliased(Question)
    unanswered = sa.exists().where(is_before(before, Question), before.status.in_(("pending", "running")))
    candidates = (
        select(Question)
        .where(sa.or_(Question.status == "pending", lost), ~unanswered)
        .filter_by(**kind)
        .order_by(Question.id)
        .limit(count)
        .with_for_update(skip_locked=True)  # SQLite has no such words: there the number of attempts alone decides
    )
    with engine.begin() as database:
        ended = f"{tries} workers ended, or lost their answer, while they held it"
        given_up = update(Question).where(lost, Question.attempts >= tries)
        database.execute(given_up.values(status="failed", error=ended, answered=func.now()))
        claims = []
        for row in database.execute(candidates).all():
            same = (Question.id == row.id, Question.status == row.status, Question.attempts == row.attempts)
            held = {"status": "running", "worker": worker, "attempts": row.attempts + 1, "lease": now + lease}
            if database.execute(update(Question).where(*same).values(held)).rowcount:
                claims.append(Claim(row.id, row.session, row.question, row.attempts + 1, history(database, row, turns)))
    return claims


def clock(engine: Engine) -> ColumnElement[float]:
    """Return the time of the database, in seconds since 1970, as an expression."""
    return sa.literal_column(CLOCKS[engine.dialect.name], sa.Double)


def is_before(one: Any, other: Any) -> ColumnElement[bool]:
    """Return whether a question stands before another one in the same dialogue, as an expression."""
    same = [getattr(one, name) == getattr(other, name) for name in ("session", "bot_type", "sub_type")]
    return sa.and_(*same, sa.tuple_(one.sequence, one.id) < sa.tuple_(other.sequence, other.id))


def history(database: sa.Connection, row: Any, turns: int) -> list[dict[str, str]]:
    """Return the last ``turns`` answered questions before a row in its session, as messages."""
    answered = select(Question.question, Question.answer).where(is_before(Question, row), Question.status == "done")
    newest = answered.order_by(Question.sequence.desc(), Question.id.desc()).limit(turns)
    pairs = reversed(database.execute(newest).all())
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def held_by(worker: str, one: Claim) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions under which a row is still this worker's, by this claim."""
    return Question.id == one.id, Question.status == "running", Question.worker == worker, Question.attempts == one.attempt


def renew(engine: Engine, worker: str, claims: Sequence[Claim], lease: float) -> None:
    """Hold questions for another lease, in seconds from now."""
    with engine.begin() as database:
        for one in claims:
            database.execute(update(Question).where(*held_by(worker, one)).values(lease=clock(engine) + lease))


def finish(engine: Engine, worker: str, outcomes: Sequence[tuple[Claim, dict[str, Any]]]) -> list[Claim]:
    """Write outcomes back (status, and answer or error); returns the claims that this worker did not hold any more."""
    missed = []
    with engine.begin() as database:
        for one, outcome in outcomes:
            values = {**outcome, "lease": 0.0, "answered": None if outcome["status"] == "pending" else func.now()}
            if not database.execute(update(Question).where(*held_by(worker, one)).values(values)).rowcount:
                missed.append(one)
    return missed


def counts(engine: Engine) -> dict[str, int]:
    """Return how many questions there are of each status."""
    with engine.connect() as database:
        found = dict(database.execute(select(Question.status, func.count()).group_by(Question.status)).tuples().all())
    return {state: found.get(state, 0) for state in STATES}
