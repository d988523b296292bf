import pytest

from zeroflow.text.redaction import host, redacted, without_login


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cret@box:5000/api failed", "http://***@box:5000/api failed"),
        ("at https://s3cret@box, mail me@x.org", "at https://***@box, mail me@x.org"),
        ("postgresql+asyncpg://me:s3/cr@et@db:5432/x", "postgresql+asyncpg://***@db:5432/x"),
        ("mysql://db/x?user=me&password=s3cret&a=1", "mysql://db/x?user=me&password=***&a=1"),
        ("https://s/f?X-Amz-Signature=s3cret", "https://s/f?X-Amz-Signature=***"),
        ("the token hf_s3cretS3cretS3cret", "the token hf_***"),
    ],
)
def test_no_password_is_shown(text, shown):
    assert redacted(text) == shown == redacted(shown)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/data_cache/mlflow/mlflow.db",
        "sqlite+pysqlite:///file:/a%3Fb@c/mlflow.db?uri=true",
        "http://127.0.0.1:5000/#/experiments/1/runs?orderByKey=metrics.%60loss%2Fval%60&a=b@c",
        "hf://datasets/me/x@main",
        "s3://bucket/a@b",
        "step 3: 12 tokens=5 & a@b",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_link_and_host_are_without_login():
    assert without_login("http://me:s3cret@box:5000/a@b") == "http://box:5000/a@b"
    assert host("http://me:s3cret@box:5000/a") == "box:5000"
