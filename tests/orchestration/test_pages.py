import base64
import warnings

from pipeline import LOGINS, api, free_port

from zeroflow.orchestration import pages
from zeroflow.orchestration.access import Api
from zeroflow.report.pages import Page
from zeroflow.text.markup import Markdown


def test_page_that_cannot_be_shown_is_a_warning_only(caplog):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        caplog.at_level("WARNING"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Prefect: a page outside of a run
        pages.publish(Page((Markdown("# page"),)), "report", "mine")
    assert any("cannot show the report in Prefect" in m for m in caplog.messages)


def test_progress_that_cannot_be_shown_is_one_warning(caplog):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        show = pages.ProgressBar("training", "mine")
        for share in (0.5, 0.6, 1.0, 1.0):
            show(share, "step")
    assert len(caplog.messages) == 1
    assert "cannot show progress of training in Prefect" in caplog.text


def test_progress_is_updated_every_few_seconds_at_most(prefect_api):
    from prefect import flow
    from prefect.settings import temporary_settings

    def shown() -> tuple[float, str]:
        kept = api(prefect_api, "/artifacts/latest/filter")
        [page] = [page for page in kept if page["key"] == "shards-progress-own-name"]
        return page["data"], page["description"]

    @flow(name="shows")
    def shows() -> None:
        show = pages.ProgressBar("shards", "Own.name")
        show(0.123, "first")
        show(0.5, "too soon")
        assert shown() == (12.3, "shards: first")
        show(1.0, "shards: last")  # text of a terminal, which shows no subject beside it
        assert shown() == (100, "shards: last")

    with temporary_settings(Api(prefect_api, LOGINS[prefect_api]).settings):
        shows()


def test_live_plot_replaces_the_previous_one(prefect_api, tmp_path):
    from prefect import flow
    from prefect.settings import temporary_settings

    def shown() -> list[str]:
        kept = api(
            prefect_api, "/artifacts/filter", artifacts={"key": {"any_": ["loss-live-drawn"]}}
        )
        return [page["data"] for page in kept]

    plot = tmp_path / "loss.png"

    @flow(name="draws")
    def draws() -> None:
        show = pages.LivePlot("loss", "drawn")
        for content in (b"first", b"second"):
            plot.write_bytes(content)
            show(plot)
            data = base64.b64encode(content).decode()
            assert shown() == [f"![loss](data:image/png;base64,{data})"]

    with temporary_settings(Api(prefect_api, LOGINS[prefect_api]).settings):
        draws()


def test_page_is_shown_under_a_key_that_prefect_accepts(prefect_api):
    from prefect import flow
    from prefect.settings import temporary_settings

    @flow(name="publishes")
    def publishes() -> None:
        pages.publish(Page((Markdown("# page of ä"),)), "Report", "Own.name_ä")

    with temporary_settings(Api(prefect_api, LOGINS[prefect_api]).settings):
        publishes()
    kept = api(prefect_api, "/artifacts/latest/filter")
    [page] = [page for page in kept if page["description"] == "Report of Own.name_ä"]
    assert page["key"] == "report-own-name" and page["data"].strip() == "# page of ä"
