"""The user interfaces in a browser: a run from the form, watched, cancelled, retried, compared."""

import json
import shutil
import signal
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from logged import step_record
from patience import wait_until
from pipeline import Ui, api, logged_steps

from zeroflow.run_folder import Cache
from zeroflow.tracking import tracker
from zeroflow.tracking.config import PARENT, TrackingConfig, location
from zeroflow.tracking.store import run_ids
from zeroflow.tracking.viewer import links
from zeroflow.training.metrics import points

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
FIRST = {"seq_len": 32, "max_steps": 1500, "learning_rate": 1e-2}
TRAINING = {
    "batch_size": 4,
    "grad_accum_steps": 1,
    "validation_tokens": 512,
    "validate_every": 1500,
    "checkpoint_every": 1500,
    "log_interval": 5,
    "sample_tokens": 8,
}


@pytest.fixture
def both(tmp_path: Path, base_environment: dict[str, str]) -> Iterator[Ui]:
    both = Ui(tmp_path / "cache", base_environment)
    both.start()
    try:
        yield both
    finally:
        both.process.send_signal(signal.SIGTERM)
        both.end(expect=0)


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def field(page: Any, label: str) -> Any:
    """The part of the form that holds one setting."""
    return page.locator(".schema-form-property", has_text=f"{label} (Optional)").last


def flow_run(both: Ui) -> dict[str, Any]:
    [run] = api(f"{both.prefect}/api", "/flow_runs/filter")
    return run


def wait_for(page: Any, both: Ui, *states: str) -> None:
    wait_until(lambda: flow_run(both)["state_type"] in states, " or ".join(states))


def test_run_is_started_from_the_form_watched_cancelled_and_retried(both: Ui, page: Any) -> None:
    named = {"name": {"any_": ["custom"]}}
    [deployment] = api(f"{both.prefect}/api", "/deployments/filter", deployments=named)
    # filled in as by "Copy to new run", but for what is typed below
    run = FIRST | {"cache_dir": str(both.cache), "model": SHAPE, "training": TRAINING}
    run |= {"data_mode": "synthetic", "tokenizer": {"vocab_size": 512}}
    filled = urllib.parse.quote(json.dumps({"run": run}))
    form = f"{both.prefect}/deployments/deployment/{deployment['id']}/run?parameters={filled}"
    page.goto(form)
    page.get_by_placeholder("admin:pass").fill(both.login)
    page.get_by_role("button", name="Login").click()
    page.wait_for_url("**/deployments/**")
    page.goto(form)
    name = field(page, "Run to start or resume")
    name.get_by_text("An existing run of this name is resumed").wait_for()
    name.locator("textarea, input").last.fill("by-hand")
    field(page, "Context length").get_by_text("At least 2.").wait_for()
    assert page.get_by_text("Seed (Optional)").count() == 0, "its group is folded"
    field(page, "Other settings").get_by_role("button", name="Set", exact=True).click()
    seed = field(page, "Seed").locator("input").last
    seed.fill("-1")
    page.get_by_role("button", name="Submit").click()
    refused = "'run.other.seed'. Failure reason: -1 is less than the minimum of 0"
    page.get_by_text(refused).first.wait_for()
    assert api(f"{both.prefect}/api", "/flow_runs/filter") == []
    seed.fill("7")
    for _ in range(10):  # on a slow machine the form may still have the number before
        page.get_by_role("button", name="Submit").click()
        page.wait_for_timeout(5000)
        if api(f"{both.prefect}/api", "/flow_runs/filter"):
            break

    events = both.cache / "runs" / "by-hand" / "events.jsonl"
    wait_until(lambda: events.exists() and logged_steps(events.read_text()))
    asked = flow_run(both)
    assert asked["name"] == "custom · synthetic · by-hand"
    assert {"custom", "synthetic", "cpu"} <= {*asked["tags"]}
    page.goto(f"{both.prefect}/runs/flow-run/{asked['id']}")
    page.get_by_text("step 1/1500").first.wait_for()

    page.get_by_role("button", name="Cancel").first.click()
    page.get_by_role("button", name="Confirm").last.click()
    wait_for(page, both, "CANCELLED")
    assert list((both.cache / "runs" / "by-hand" / "checkpoints").iterdir())

    page.reload()
    page.get_by_role("button", name="Retry").first.click()
    page.get_by_role("button", name="Retry").last.click()
    wait_for(page, both, "COMPLETED")
    assert (flow_run(both)["id"], flow_run(both)["run_count"]) == (asked["id"], 2)

    page.reload()
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("report-by-hand").first.wait_for()
    kept = api(f"{both.prefect}/api", "/artifacts/latest/filter")
    pages = {page["key"]: page for page in kept}
    assert pages["training-progress-by-hand"]["data"] == 100
    assert "step 1500/1500" in pages["training-progress-by-hand"]["description"]
    assert both.mlflow in pages["report-by-hand"]["data"]

    curves = links(Cache(both.cache).run("by-hand"))["loss of all runs"]
    names = add_a_sweep(both.cache)
    page.goto(curves)
    for name in ("by-hand", *names):  # runs of a sweep are not hidden within it
        page.get_by_role("link", name=name, exact=True).wait_for()
    page.get_by_text("loss/train", exact=True).first.wait_for()


def add_a_sweep(cache: Path) -> list[str]:
    """Two runs that MLflow shows as those of a third; their names."""
    uri, store = location(cache)
    sweep = TrackingConfig(
        uri=uri, folder=store, run_name="sweep", tags={}, params={}, dataset=None
    )
    group = Cache(cache).sweep("sweep")
    tracker.open_group(sweep, group)
    ids = run_ids(group)
    assert ids is not None
    names = ["sweep-tiny", "sweep-small"]
    for name in names:
        config = sweep.replace(run_name=name, tags={PARENT: ids.run_id})
        folder = Cache(cache).run(name)
        folder.path.mkdir()
        records = [step_record(step, 9.0 - step) for step in range(1, 4)]
        tracker.MlflowRun(config, folder).send(points(records))
    return names
