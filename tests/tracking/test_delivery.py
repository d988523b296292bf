"""Reasons of failed deliveries, from the errors that the trackers' libraries raise."""

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from zeroflow.tracking.delivery import reason


class Base(DeclarativeBase): ...


class Metric(Base):
    __tablename__ = "metrics"

    key: Mapped[str] = mapped_column(primary_key=True)


def test_reason_of_a_failed_flush_is_that_of_the_database():
    with Session(create_engine("sqlite://")) as session:
        session.add(Metric(key="loss"))
        with pytest.raises(SQLAlchemyError) as failed:
            session.query(Metric).all()  # flushes first, into a table that does not exist
    assert str(failed.value).startswith("(raised as a result of Query-invoked autoflush")
    assert reason(failed.value) == "(sqlite3.OperationalError) no such table: metrics"


def test_reason_is_one_line_without_passwords():
    error = ConnectionError("http://me:secret@host is gone\n<html>")
    assert reason(error) == "http://***@host is gone"
    assert reason(ValueError()) == "ValueError"
