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
        ("key pnu_s3cretS3cretS3cret9", "key pnu_***"),
        ("https://a.blob/c?sv=1&sig=s3cret%3D", "https://a.blob/c?sv=1&sig=***"),
        ("https://s/f?X-Amz-Credential=s3cret/x&b=1", "https://s/f?X-Amz-Credential=***&b=1"),
        ("https://s/f?auth=s3cret&key=s3cret#a", "https://s/f?auth=***&key=***#a"),
        ("https://s/f?passphrase=s3cret", "https://s/f?passphrase=***"),
        ("https://s/f#access_token=s3cret", "https://s/f#access_token=***"),
        ("mssql://Driver=x;UID=me;PWD=s3cret;Port=1", "mssql://Driver=x;UID=me;PWD=***;Port=1"),
        ("Driver={x};UID=me,PWD={s3;cret};Port=1", "Driver={x};UID=me,PWD=***;Port=1"),
        ("http://me:s3/cr#et@box:5000/api failed", "http://***@box:5000/api failed"),
        ("http://me:s3 cr et@box:5000/api failed", "http://***@box:5000/api failed"),
        ("postgresql://me:s3 cret@db/x", "postgresql://***@db/x"),
        ("host=db user=me password=s3cret dbname=x", "host=db user=me password=*** dbname=x"),
        ("password='s3 cret' dbname=x", "password='***' dbname=x"),
        ("Authorization: Bearer s3cret.S3cret9", "Authorization: Bearer ***"),
        ("Authorization: Basic bWU6czNjcmV0", "Authorization: Basic ***"),
        ("PREFECT_API_KEY=s3cret", "PREFECT_API_KEY=***"),
        ("PREFECT_API_AUTH_STRING=me:s3cret", "PREFECT_API_AUTH_STRING=***"),
        ("{'password': 's3cret', 'a': 1}", "{'password': '***', 'a': 1}"),
        ('{"api_key": "s3cret", "a": 1}', '{"api_key": "***", "a": 1}'),
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
        "the last token: 5; --end-of-text token=<x>",
        "at http://box:5000/api, mail me@x.org",
        "http://127.0.0.1:4200/api: me@x.org did not answer",
        "PREFECT_API_AUTH_STRING, or unset PREFECT_API_URL",
        "a basic understanding; key=value",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_link_and_host_are_without_login():
    assert without_login("http://me:s3cret@box:5000/a@b") == "http://box:5000/a@b"
    assert host("http://me:s3cret@box:5000/a") == "box:5000"
