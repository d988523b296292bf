import shutil
import time

import pytest

from zeroflow import artifacts
from zeroflow.data import claims
from zeroflow.data.claims import Claims


@pytest.fixture
def part(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    return tmp_path / "part-00007"


def taken(by: Claims, part, *, within: float = 30.0):
    """Try to take over a part until this succeeds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if claim := by.take(part):
            return claim
        time.sleep(0.02)
    return None


def test_part_has_one_holder_until_it_is_released_and_is_not_claimed_once_it_exists(part):
    with Claims() as ours, Claims() as theirs:
        claim = ours.take(part)
        assert claim and not theirs.take(part) and not ours.take(part)
        ours.release(claim)
        other = theirs.take(part)
        assert other and other.mark != claim.mark
        part.mkdir()
        theirs.release(other)
        assert ours.take(part) is None
    assert [path.name for path in part.parent.iterdir()] == ["part-00007"]


def test_live_holder_keeps_its_claim_for_longer_than_a_lease(part):
    with Claims() as ours, Claims() as theirs:
        claim = ours.take(part)
        assert claim and taken(theirs, part, within=1.5) is None and not claim.is_lost


def test_silent_holder_loses_its_claim_to_one_other_process(part):
    dead = Claims()  # it does not count
    lost = dead.take(part)
    left = artifacts.partial_path(part, lost.mark)
    left.mkdir()
    with Claims() as first, Claims() as second:
        claim = taken(first, part)
        assert claim and lost.is_lost and not left.exists(), "its half of a part is removed"
        assert taken(second, part, within=0.6) is None
        dead.release(lost)
        assert not claim.is_lost and second.take(part) is None, "what it held is another's now"
        first.release(claim)
        assert second.take(part)


def test_claim_of_a_holder_that_died_before_its_first_beat_is_taken_over(part):
    part.with_name(f".{part.name}.claim-1").touch()
    with Claims() as others:
        assert others.take(part) is None, "it may have just been created"
        assert taken(others, part)


def test_claims_are_released_at_the_end_even_after_an_error(part):
    with pytest.raises(KeyboardInterrupt), Claims() as ours:
        assert ours.take(part)
        raise KeyboardInterrupt
    assert not list(part.parent.iterdir())


def test_first_complete_part_is_kept_also_under_a_lock(tmp_path):
    part = tmp_path / "part-00001"

    def write(folder, content):
        (folder / "rows").write_text(content)
        artifacts.seal(folder, {})

    def slow(folder):
        write(folder, "slow")
        assert not artifacts.build_first(part, lambda other: write(other, "fast"), mark="b")

    builds = [lambda path, build: artifacts.build_first(path, build, mark="a")]
    for build in (*builds, artifacts.build_once):
        assert build(part, slow), "another was faster"
        assert (part / "rows").read_text() == "fast"
        assert artifacts.verify(part)
        shutil.rmtree(part)
        assert not list(tmp_path.glob(".*partial"))
