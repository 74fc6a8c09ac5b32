"""Records in a database: SQLite in a file by default, anything SQLAlchemy speaks by URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import msgspec
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from nitsum.errors import NitsumError
from nitsum.ledger.records import Record, Run

_TYPES: dict[type, Any] = {int: sa.BigInteger, float: sa.Double, str: sa.Text, bool: sa.Boolean}
_INDEXED = ("at_ms", "key_id")
_READ_ROWS = 1000
_BUSY_S = 30
"""How long a writer waits for another one of the same SQLite file."""


class LedgerError(NitsumError):
    """The ledger cannot be opened, read or written."""


def _table(metadata: sa.MetaData, name: str, kind: type[msgspec.Struct]) -> sa.Table:
    """A column for each field, `id` as primary key."""
    hints = get_type_hints(kind)
    columns = [_column(field, hints[field]) for field in kind.__struct_fields__]
    return sa.Table(name, metadata, *columns)


def _column(name: str, hint: Any) -> sa.Column[Any]:
    args = [arg for arg in get_args(hint) if arg is not type(None)]
    nullable = isinstance(hint, UnionType)
    base = args[0] if nullable else hint
    return sa.Column(
        name,
        _TYPES.get(base, sa.Text),
        primary_key=name == "id",
        nullable=nullable,
        index=name in _INDEXED,
    )


METADATA = sa.MetaData()
RECORDS = _table(METADATA, "nitsum_ledger", Record)
RUNS = _table(METADATA, "nitsum_runs", Run)


class Store:
    """The two tables of one database; used by one thread at a time."""

    def __init__(self, where: str) -> None:
        """`where` is the path of a SQLite file or a database URL.

        Raises `LedgerError`, without the URL's password, when it cannot be opened.
        """
        self.engine = _engine(where)
        self.name = self.engine.url.render_as_string(hide_password=True)
        try:
            METADATA.create_all(self.engine)
        except SQLAlchemyError as error:
            raise LedgerError(
                f"The ledger {self.name} cannot be opened: {_cause(error)}."
            ) from None

    def write(self, records: Sequence[Record]) -> None:
        """Add records; those that are there already stay as they are."""
        if not records:
            return
        rows = [msgspec.structs.asdict(record) for record in records]
        try:
            with self.engine.begin() as connection:
                connection.execute(RECORDS.insert(), rows)
        except IntegrityError:
            # An earlier attempt was stored although its answer got lost.
            self._write_missing(rows)

    def _write_missing(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            with suppress(IntegrityError), self.engine.begin() as connection:
                connection.execute(RECORDS.insert(), [row])

    def see(self, run: Run) -> None:
        """Note that a server is up."""
        row = msgspec.structs.asdict(run)
        with self.engine.begin() as connection:
            found = connection.execute(
                RUNS.update().where(RUNS.c.id == run.id).values(seen_ms=run.seen_ms)
            )
            if not found.rowcount:
                connection.execute(RUNS.insert(), [row])

    def records(self, *where: sa.ColumnElement[bool]) -> Iterator[Record]:
        """Records by time of arrival, read as they are taken."""
        query = sa.select(RECORDS).where(*where).order_by(RECORDS.c.at_ms, RECORDS.c.id)
        with self.engine.connect() as connection:
            streamed = connection.execution_options(yield_per=_READ_ROWS)
            for row in streamed.execute(query).mappings():
                yield Record(**row)

    def runs(self) -> list[Run]:
        return [Run(**row) for row in self.rows(sa.select(RUNS).order_by(RUNS.c.started_ms))]

    def rows(self, query: sa.Executable) -> list[dict[str, Any]]:
        """A query's rows as dictionaries; raises `LedgerError`."""
        try:
            with self.engine.connect() as connection:
                return [dict(row) for row in connection.execute(query).mappings()]
        except SQLAlchemyError as error:
            raise LedgerError(f"The ledger {self.name} cannot be read: {_cause(error)}.") from None

    def spent_nano(self) -> dict[str, int]:
        """What each key has paid so far, credits given back."""
        paid = sa.func.sum(RECORDS.c.cost_nano - RECORDS.c.credit_nano)
        rows = self.rows(sa.select(RECORDS.c.key_id, paid.label("paid")).group_by(RECORDS.c.key_id))
        return {row["key_id"]: int(row["paid"]) for row in rows}

    def close(self) -> None:
        self.engine.dispose()


def _engine(where: str) -> Engine:
    if "://" not in where:
        _make_folder(Path(where).parent)
        where = f"sqlite:///{where}"
    try:
        url = make_url(where)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, connect_args=_connect_args(url.get_backend_name()))
    except ArgumentError as error:
        raise LedgerError(f"--ledger: {error} A path or a database URL is expected.") from None
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"The ledger needs the package {error.name!r} for this database; for PostgreSQL, "
            "install nitsum[postgres]."
        ) from None
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(
            f"The ledger's folder {folder} cannot be made ({error.strerror}). Name another place: "
            "--ledger PATH or --data-dir DIR, or keep none: --ledger none."
        ) from None


def _connect_args(backend: str) -> dict[str, object]:
    return {"timeout": _BUSY_S} if backend == "sqlite" else {}


def _set_up_sqlite(connection: Any, record: object) -> None:
    """Readers do not stop the writer, and a commit is on disk when it returns."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _cause(error: SQLAlchemyError) -> str:
    """The database's own words, on one line."""
    words = str(getattr(error, "orig", None) or error)
    return " ".join(words.split()).rstrip(".")
